"""A result as one page that anybody can open: figures, page, template."""

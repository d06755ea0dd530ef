"""Templates of this package, filled; the only home of jinja2."""

from collections.abc import Callable
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def fill(template: str, *filters: Callable[..., object], **content: Any) -> str:
    """Return a page; what the content lacks is an error, not a gap.

    The filters are known to the template by their own names.
    """
    environment = Environment(
        loader=PackageLoader("fedgraft.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {function.__name__: function for function in filters}
    return environment.get_template(template).render(content)

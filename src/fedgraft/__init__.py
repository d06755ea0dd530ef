"""fedgraft: graft instructions onto fresh knowledge."""

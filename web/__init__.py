"""The dashboard: pages over a `Console`, drawn on the server and kept fresh by one stream of events per page."""

from .console import Account, Console
from .pages import pages
from .rendering import static_app
from .security import SecurityHeaders

__all__ = ["Account", "Console", "SecurityHeaders", "pages", "static_app"]

"""HTML pages without scripts, fonts or other files: Jinja templates that extend page_base.html.

Jinja escapes every value, and the page's policy forbids scripts should one slip through.
"""

from pathlib import Path
from typing import Any

import markupsafe

from unicl_fast.system.wording import count_of, visible_text


def fill_page(template: Path, **values: Any) -> str:
    """Returns the page as text, to be written in UTF-8; a missing value is an UndefinedError."""
    import jinja2  # here, since --help need not wait for it

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        finalize=visible,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["thousands"] = "{:,}".format
    environment.globals["count_of"] = count_of
    return environment.get_template(template.name).render(**values)


def visible(value: Any) -> Any:
    """Returns a text by `visible_text`; leaves HTML and other values alone."""
    is_text = isinstance(value, str) and not isinstance(value, markupsafe.Markup)
    return visible_text(value) if is_text else value

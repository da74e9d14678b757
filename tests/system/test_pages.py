"""Pages: texts from anywhere are shown as they are, and a template misses no value."""

import jinja2
import pytest

from unicl_fast.system.pages import fill_page


def test_a_page_escapes_its_values_and_misses_none(tmp_path):
    template = tmp_path / "page.html"
    template.write_text("{% extends 'page_base.html' %}{% block main %}{{ text }}{% endblock %}")
    text = fill_page(template, text="<b>\x07")
    assert "&lt;b&gt;\\x07" in text
    assert "default-src 'none'" in text
    with pytest.raises(jinja2.UndefinedError, match="'text' is undefined"):
        fill_page(template)

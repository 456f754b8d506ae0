"""The page's files: whole, served by fixed names, and without anything from elsewhere."""

import re
import tomllib
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import httpx2
import pytest

from edgeroute.server import dashboard
from edgeroute.server.dashboard import FILES, StaticFile, routes
from edgeroute.server.records import ServerParams, Services
from tests.server import lab

STATIC = resources.files("edgeroute.server") / "static"
TEXTS = {name: (STATIC / name).read_text("utf-8") for name in FILES}
SCRIPTS = {name: text for name, text in TEXTS.items() if name.endswith(".js")}
NAMESPACE = "http://www.w3.org/2000/svg"
FIELDS = ("button", "input", "select", "textarea")


class Page(HTMLParser):
    """What the tests look at of the page."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inside: list[str] = []
        self.inline: list[str] = []
        self.labelled: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in FIELDS and "label" in self.inside:
            self.labelled.append(dict(attrs).get("id") or "")
        if tag not in ("meta", "link", "img", "input"):
            self.inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.inside.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if self.inside and self.inside[-1] in ("script", "style") and data.strip():
            self.inline.append(data)

    def values(self, name: str) -> list[str]:
        return [attrs[name] or "" for _, attrs in self.elements if name in attrs]


@pytest.fixture(scope="module")
def page() -> Page:
    found = Page()
    found.feed(TEXTS["index.html"])
    assert not found.inside
    return found


def serve(**params: object) -> "Services":
    return Services(params=ServerParams(**params), models=None)  # type: ignore[arg-type]


def test_nothing_is_inline(page: Page) -> None:
    """The policy would stop it: the page would be dead in every browser."""
    assert not page.inline
    for tag, attrs in page.elements:
        assert tag != "style" and "style" not in attrs, attrs
        assert not [name for name in attrs if name.startswith("on")], attrs
        assert tag != "script" or attrs.get("src")
    for name, text in SCRIPTS.items():
        assert not re.search(r"\beval\(|new Function\(|innerHTML|outerHTML|insertAdjacentHTML|"
                             r"document\.write|setAttribute\(\"style\"", text), name  # fmt: skip


def test_nothing_comes_from_elsewhere(page: Page) -> None:
    for name, text in TEXTS.items():
        assert not re.findall(r"(?:https?:)?//[\w-]+\.\w+", text.replace(NAMESPACE, "")), name
        assert "@import" not in text and "url(" not in text, name
    for link in page.values("src") + page.values("href"):
        assert link.startswith(("/static/", "#")), link


def test_every_file_that_is_asked_for_is_served(page: Page) -> None:
    asked = {link.removeprefix("/static/") for link in page.values("src") + page.values("href")
             if link.startswith("/static/")}  # fmt: skip
    for text in SCRIPTS.values():
        asked |= set(re.findall(r'from "/static/([\w.]+)"', text))
    assert asked == set(FILES) - {"index.html"}
    assert {each.name for each in STATIC.iterdir()} == set(FILES)


def test_every_id_that_is_named_exists_once(page: Page) -> None:
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    named = page.values("for") + [link[1:] for link in page.values("href") if link[0] == "#"]
    for attribute in ("aria-labelledby", "aria-describedby", "aria-controls"):
        named += page.values(attribute)
    for text in SCRIPTS.values():
        named += re.findall(r'byId\("([\w-]+)"\)', text)
    named += re.findall(r"(?<![\w&{])#([a-z][\w-]*)(?=[\s.:,{\[])", TEXTS["app.css"])
    assert named and not set(named) - set(ids)


def test_every_imported_name_is_exported() -> None:
    for name, text in SCRIPTS.items():
        for names, source in re.findall(r'import \{([^}]*)\} from "/static/([\w.]+)"', text):
            exported = re.findall(r"export (?:async )?(?:function|class|const) (\w+)",
                                  SCRIPTS[source])  # fmt: skip
            wanted = {each.strip() for each in names.split(",")}
            assert not wanted - set(exported), (name, source)


def test_every_field_has_a_label_and_every_section_a_heading(page: Page) -> None:
    labels = page.values("for")
    for tag, attrs in page.elements:
        if tag in ("input", "select", "textarea"):
            name = attrs.get("id") or ""
            assert name in labels or name in page.labelled, attrs
        if tag == "section":
            assert attrs.get("aria-labelledby"), attrs
        if tag == "button":
            assert attrs.get("type") in ("button", "submit"), attrs
    assert [tag for tag, _ in page.elements].count("h1") == 1
    assert page.elements[0] == ("html", {"lang": "en"})


def test_files_are_served_with_their_types_and_a_tag() -> None:
    services = serve()
    with lab.serving(services, routes(services)) as base, httpx2.Client(base_url=base) as client:
        for name, kind in FILES.items():
            path = "/" if name == "index.html" else f"/static/{name}"
            found = client.get(path)
            assert (found.status_code, found.headers["content-type"]) == (200, kind)
            assert found.text == TEXTS[name]
            assert "default-src 'self'" in found.headers["content-security-policy"]
            assert "unsafe" not in found.headers["content-security-policy"]
            again = client.get(path, headers={"If-None-Match": f'"x", W/{found.headers["etag"]}'})
            assert (again.status_code, again.content) == (304, b"")
            other = client.get(path, headers={"If-None-Match": '"x"'})
            assert other.status_code == 200
            head = client.head(path)
            assert (head.status_code, head.content) == (200, b"")
            assert client.post(path).status_code == 405


def test_no_path_leads_to_any_other_file() -> None:
    services = serve()
    with lab.serving(services, routes(services)) as base, httpx2.Client(base_url=base) as client:
        for path in ("/static/", "/static/index.html", "/static/../live.py", "/static/..%2flive.py",
                     "/static/%2e%2e/live.py", "/static//etc/passwd", "/static/app.js%00",
                     "/static/APP.JS", "/live.py"):  # fmt: skip
            assert client.get(path).status_code == 404, path


def test_switched_off_there_is_nothing() -> None:
    services = serve(dashboard=False)
    with lab.serving(services, routes(services)) as base, httpx2.Client(base_url=base) as client:
        assert client.get("/").status_code == client.get("/static/app.js").status_code == 404


def test_a_tag_changes_with_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    tags = {StaticFile.read(name).etag for name in FILES}
    assert len(tags) == len(FILES)
    monkeypatch.setitem(dashboard.FILES, "gone.js", "text/javascript")
    with pytest.raises(FileNotFoundError):
        StaticFile.read("gone.js")


def test_the_files_are_in_the_package() -> None:
    """What is not named there is missing from a wheel, without any error."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))
    assert "static/*" in project["tool"]["setuptools"]["package-data"]["edgeroute.server"]

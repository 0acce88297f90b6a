"""Results that come from others: nothing in them runs in the page, leaves its place, or brings other files along."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.reporting.reading import Page, report
from vllm_trimix.reporting import page as pages
from vllm_trimix.reporting import pictures, sources

ENVIRONMENT = {"environment": {"date": "2026-01-02", "device": "Some CPU"}}
PAYLOADS = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'><svg/onload=alert(1)>",
    "</pre></details></section><script>alert(1)</script>",
    "</style></title><script>alert(1)</script>",
    "<!-- a comment",
    "<iframe srcdoc='<script>alert(1)</script>'>",
    "{{ 7 * 7 }}{% include 'page.css' %}{# gone #}",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "<a href=javascript:alert(1)>x</a>",
]


def _png(colour: str = "red") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(stream, "PNG")
    return stream.getvalue()


def _folder(path: Path, markdown: str | None = None, value: object = None) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    if markdown is not None:
        (path / "report.md").write_text(markdown)
    if value is not None:
        (path / "result.json").write_text(json.dumps(value))
    return path


@pytest.mark.parametrize("payload", PAYLOADS)
def test_html_in_markdown_is_text(payload: str, tmp_path: Path) -> None:
    places = {
        "title": f"# T {payload}\n",
        "paragraph": f"{payload}\n",
        "block": f"\n\n{payload}\n\n",
        "cell": f"| a | {payload} |\n|---|---|\n| 1 | {payload} |\n",
        "code": f"`{payload}`\n",
        "fence": f"```{payload}\n{payload}\n```\n",
        "link": f'[{payload}](https://example.org "{payload}")\n',
        "target": f"[x](https://example.org/{quote(payload)})\n\n[y](<{payload}>)\n",
        "alternative": f"![{payload}](there.png)\n",
        "missing": f"![x](<{payload}>)\n",
        "reference": f'[x]\n\n[x]: https://example.org "{payload}"\n',
    }
    for place, markdown in places.items():
        folder = _folder(tmp_path / place, markdown)
        (folder / "there.png").write_bytes(_png())
        page = report(folder, output=tmp_path / "page.html")
        # Entities are Markdown's own: they stand for what they name.
        expected = payload.replace("&lt;", "<").replace("&gt;", ">") if place not in ("code", "fence") else payload
        if place == "alternative":
            assert [image["alt"] for image in page.attributes("img")] == [expected]
        elif place in ("title", "paragraph", "block", "cell", "code", "fence", "link"):
            assert expected in page.text, place


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("markdown", [None, "# A title\n"], ids=["tables", "markdown"])
def test_html_in_json_and_names_is_text(payload: str, markdown: str | None, tmp_path: Path) -> None:
    name = payload.replace("/", "|")
    value = {
        "environment": {"device": payload, "commit": payload, payload: payload, "versions": {payload: payload}},
        "note": payload,
        payload: payload,
        "rows": [{payload: payload}, {payload: [payload]}],
        "nested": {payload: {payload: payload}},
    }
    folder = _folder(tmp_path / name, markdown)
    (folder / f"{name}.json").write_text(json.dumps(value))
    (folder / f"{name}.png").write_bytes(_png())
    page = report(folder, output=tmp_path / "page.html")
    assert json.loads(page.pre[0]) == value
    assert [image["alt"] for image in page.attributes("img")] == [f"{name}.png"]
    assert [payload, payload] in [row for table in page.tables for row in table]
    assert name in page.text
    if markdown is None:
        assert [[payload], [payload], [payload]] in page.tables


@pytest.mark.parametrize(
    "markdown",
    [
        "[x](javascript:alert(1))",
        "[x](JaVaScRiPt:alert(1))",
        "[x](java&#x09;script:alert(1))",
        "[x](<java\tscript:alert(1)>)",
        "[x](&#106;avascript:alert(1))",
        "[x](%6Aavascript:alert(1))",
        "[x](\x01javascript:alert(1))",
        "[x](vbscript:alert(1))",
        "[x](data:text/html;base64,PHNjcmlwdD4=)",
        "[x](data:image/png;base64,PHNjcmlwdD4=)",
        "[x](file:///etc/passwd)",
        "[x](blob:https://example.org/1)",
        "[x](//example.org/x)",
        "[x](result.json)",
        "[x](../other/report.md)",
        "[x](#result-1)",
        "<javascript:alert(1)>",
        "<x-other:alert(1)>",
        "[x]\n\n[x]: javascript:alert(1)",
        "![x](javascript:alert(1))",
        "[![x](javascript:alert(1))](javascript:alert(1))",
    ],
)
def test_links_to_anything_but_the_web_lead_nowhere(markdown: str, tmp_path: Path) -> None:
    page = report(_folder(tmp_path / "result", markdown), output=tmp_path / "page.html")
    # The table of contents alone.
    assert [link["href"] for link in page.attributes("a")] == ["#result-1"]


@pytest.mark.parametrize(
    ("markdown", "target"),
    [
        ("[x](https://example.org/a?b=1&c=2)", "https://example.org/a?b=1&c=2"),
        ("[**x** [y]](http://example.org/)", "http://example.org/"),
        ("<https://example.org/>", "https://example.org/"),
        ("<someone@example.org>", "mailto:someone@example.org"),
    ],
)
def test_links_to_the_web_stay(markdown: str, target: str, tmp_path: Path) -> None:
    page = report(_folder(tmp_path / "result", markdown), output=tmp_path / "page.html")
    (link,) = [link for link in page.attributes("a") if not link["href"].startswith("#")]
    assert link == {"href": target, "rel": "noopener noreferrer"}


SVG = b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"><script>alert(1)</script></svg>'
OUTSIDE = "lies outside the result's folder"
ELSEWHERE = "lies elsewhere"
OTHER_KIND = "is neither PNG nor JPEG, GIF or WebP"


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("../secret.png", OUTSIDE),
        ("../../../../../../../../etc/passwd.png", OUTSIDE),
        ("%2e%2e/secret.png", OUTSIDE),
        ("..%2Fsecret.png", OUTSIDE),
        ("sub/../../secret.png", OUTSIDE),
        ("ABSOLUTE/secret.png", OUTSIDE),
        ("linked.png", OUTSIDE),
        ("linked-folder/secret.png", OUTSIDE),
        ("loop.png", OUTSIDE),
        ("nul%00.png", OUTSIDE),
        ("a" * 5000, "can't be read"),
        ("missing.png", "is missing"),
        ("sub", "is missing"),
        ("pipe.png", "is missing"),
        (".", "is missing"),
        ("", "is missing"),
        ("drawing.svg", OTHER_KIND),
        ("drawing.png", OTHER_KIND),
        ("empty.png", OTHER_KIND),
        ("large.png", "is larger than 16 MiB"),
        ("http://example.org/x.png", ELSEWHERE),
        ("HTTPS://example.org/x.png", ELSEWHERE),
        ("//example.org/x.png", ELSEWHERE),
        ("data:image/png;base64,iVBORw0KGgo=", ELSEWHERE),
    ],
)
def test_pictures_that_are_not_the_results_own(
    source: str, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "secret.png").write_bytes(_png("blue"))
    markdown = f"before ![alternative]({source.replace('ABSOLUTE', quote(str(tmp_path)))}) after\n"
    folder = _folder(tmp_path / "result", markdown)
    (folder / "sub").mkdir()
    (folder / "linked.png").symlink_to(tmp_path / "secret.png")
    (folder / "linked-folder").symlink_to(tmp_path)
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "drawing.svg").write_bytes(SVG)
    (folder / "drawing.png").write_bytes(SVG)
    (folder / "empty.png").touch()
    os.mkfifo(folder / "pipe.png")
    if source == "large.png":
        (folder / source).write_bytes(_png() + bytes(pictures.MAX_BYTES))
    page = report(folder, output=tmp_path / "page.html")
    assert page.attributes("img") == []
    assert "before picture" in page.text
    assert why in page.text.partition("before picture")[2].partition(" after")[0]
    assert why in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP"])
def test_pictures_of_all_kinds(kind: str, tmp_path: Path) -> None:
    folder = _folder(tmp_path / "result", "![a](<sub/a picture.bin>) and once more ![b](sub/a%20picture.bin)\n")
    (folder / "sub").mkdir()
    Image.new("RGB", (4, 4)).save(folder / "sub" / "a picture.bin", kind)
    page = report(folder, output=tmp_path / "page.html")
    assert [image["alt"] for image in page.attributes("img")] == ["a", "b"]
    assert page.attributes("img")[0]["src"].startswith(f"data:image/{kind.lower()};base64,")


@pytest.mark.parametrize("name", ["report.md", "result.json", "plot.png"])
def test_a_link_out_of_the_folder_brings_nothing(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "secret").write_bytes(_png() if name == "plot.png" else b'{"environment": {"password": "hunter2"}}')
    folder = _folder(tmp_path / "result")
    (folder / "other.md").write_text("# Something\n")
    (folder / name).symlink_to(tmp_path / "secret")
    page = report(folder, output=tmp_path / "page.html")
    assert "hunter2" not in page.text
    assert page.attributes("img") == []
    assert f"{name!r} is a link out of the folder" in page.text
    assert f"{name!r} is a link out of the folder" in capsys.readouterr().err


def test_terminals_are_safe_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _folder(tmp_path / "a\x1b[2Jb", "# A title\n")
    (folder / "\x1b[31m.png").touch()
    report(folder, output=tmp_path / "page.html")
    out, err = capsys.readouterr()
    assert "'a\\x1b[2Jb': picture '\\x1b[31m.png' is neither PNG" in err
    assert "\x1b" not in out + err


def test_names_and_texts_that_utf8_has_not(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "result", value={**ENVIRONMENT, "half": "\ud800", "nul": "\0", "big": 10**400})
    (folder / os.fsdecode(b"bad\xff.json")).write_text(
        json.dumps({"wrong": float("nan"), "large": [1e308, 10**400] * 5})
    )
    (folder / "report.md").write_bytes(b"# A \xff title\n\nnul \x00 byte\n")
    page = report(folder, output=tmp_path / "page.html")
    assert "A \ufffd title" in page.text
    (folder / "report.md").unlink()
    page = report(folder, output=tmp_path / "page.html")
    assert "bad\\udcff.json" in page.text
    assert ["half", "\\ud800"] in [row for table in page.tables for row in table]


def test_deep_and_long_markdown(tmp_path: Path) -> None:
    many = 3000
    parts = ["> " * many + "q", "![" * many + "](x)" * many, "[" * many + "a" + "](x)" * many, "- " * many, "*" * many]
    text = "\n\n".join(parts)
    report(_folder(tmp_path / "result", text), output=tmp_path / "page.html")


def test_large_files_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_BYTES", 2**20)
    folder = _folder(tmp_path / "result", "# Something\n", {**ENVIRONMENT, "long": "x" * 2**20})
    page = report(folder, output=tmp_path / "page.html")
    assert "'result.json' is larger than 1 MiB, the limit, and was left out" in page.text
    assert page.pre == []


def test_long_json_is_cut(tmp_path: Path) -> None:
    folder = _folder(
        tmp_path / "result", value={**ENVIRONMENT, "rows": [{"n": n} for n in range(9000)], "s": "x" * 999}
    )
    page = report(folder, output=tmp_path / "page.html")
    assert len(page.pre[0]) == pages.MAX_LETTERS
    assert "The first 40,000 of " in page.text
    assert "8800 more rows are in the JSON" in page.text
    assert ["s", "x" * 197 + "..."] in [row for table in page.tables for row in table]


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(PAYLOADS),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.sampled_from(PAYLOADS), inner, max_size=4)
    ),
    max_leaves=20,
)
_WORDS = st.sampled_from(
    [
        *PAYLOADS,
        *"# | - > * _ ` [ ] ( ) ! < > \\ & : ~ 1.".split(),
        "\n",
        "\n\n",
        "|---|",
        "```",
        "[x](",
        "javascript:",
        "a",
    ]
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=_JSON, block=_JSON, words=st.lists(_WORDS, max_size=40), with_markdown=st.booleans())
def test_any_markdown_and_json(
    value: object, block: object, words: list[str], with_markdown: bool, tmp_path: Path
) -> None:
    data = {"environment": {"date": block}, "provenance": block, "rows": value, "more": {"x": value}}
    folder = _folder(tmp_path / "result", "".join(words) if with_markdown else None, data)
    sections = [pages.section(result) for result in sources.find([folder])]
    page = Page(pages.html(sections))
    page.check()
    assert len(page.attributes("section")) == 1
    (folder / "report.md").unlink(missing_ok=True)

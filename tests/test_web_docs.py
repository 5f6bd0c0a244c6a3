"""Help pages and locales: they tell of every node, input and output there is, and of nothing else.

`python tests/test_web_docs.py` writes locales/en/nodeDefs.json anew from the node classes.
"""

import ast
import functools
import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

import comfy_dancegrpo
from comfy_dancegrpo import nodes
from comfy_dancegrpo.workflow.schema import ANY, inputs_of, object_info

ROOT = Path(__file__).resolve().parent.parent
DOCS = comfy_dancegrpo.resource("web") / "docs"
LOCALES = comfy_dancegrpo.resource("locales")
RUNNER = "DanceGRPOLoopRunner"  # made by Loop End, never placed by a user: its page is one paragraph
NODES = {name: cls for name, cls in nodes.NODE_CLASS_MAPPINGS.items() if name != RUNNER}
UNTRANSLATED = {"LoRA", "CLIP"}  # names that Chinese leaves as they are


# -- the help pages -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Language:
    """How the pages of a language are written: their path, headings, and the words in an input's or output's brackets."""

    path: str
    inputs: str
    outputs: str
    problems: str
    item: str  # names label, key, facts
    default: str
    first: str  # where the default is whatever comes first in the list
    empty: str
    optional: str
    any: str


LANGUAGES = {
    "en": Language("{}.md", "Inputs", "Outputs", "When it goes wrong", r"- \*\*(?P<label>(?P<key>\w+))\*\* \((?P<facts>.+?)\): .",
                   "default {}", "the first of the list", "default empty", ", optional", "any type"),
    "zh": Language("{}/zh.md", "输入", "输出", "常见问题", r"- \*\*(?P<label>.+?)\*\* `(?P<key>\w+)`（(?P<facts>.+?)）：.",
                   "默认 {}", "默认为列表第一项", "默认为空", "，可选", "任意类型"),
}
every_page = pytest.mark.parametrize("language, name", [(language, name) for language in LANGUAGES for name in NODES])


def sections(language: str, name: str) -> dict[str, list[str]]:
    """A page by heading ("" before the first): its paragraphs and list items, a line each."""
    found: dict[str, list[str]] = {"": []}
    heading, broken = "", True
    for line in (DOCS / LANGUAGES[language].path.format(name)).read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            heading, broken = line[3:], True
            assert heading not in found
            found[heading] = []
        elif not line.strip():
            broken = True
        elif broken or line.startswith("- "):
            found[heading].append(line.strip())
            broken = False
        else:
            found[heading][-1] += " " + line.strip()
    return found


def items(language: str, name: str, heading: str) -> list[tuple[str, str, str]]:
    """(label, key, what stands in the brackets) of the list under a heading; a list item of another form fails."""
    lines = [line for line in sections(language, name)[heading] if line.startswith("- ")]
    found = [re.match(LANGUAGES[language].item, line) for line in lines]
    assert all(found), [line for line, match in zip(lines, found) if not match]
    return [(match["label"], match["key"], match["facts"]) for match in found]


def facts(item, words: Language) -> str:
    """What a page must say in brackets of an input: its type, or its default."""
    if not item.is_widget:
        return (words.any if item.type == ANY else item.type) + ("" if item.required else words.optional)
    if item.choices is not None and "default" not in item.options:
        return words.first
    default = item.options["default"]
    shown = f"{default:g}" if isinstance(default, float) else str(default)
    return words.default.format(shown) if shown else words.empty


@every_page
def test_a_page_tells_of_exactly_the_inputs_with_their_defaults(language, name):
    words = LANGUAGES[language]
    told = [(key, said) for _, key, said in items(language, name, words.inputs)]
    assert told == [(item.name, facts(item, words)) for item in inputs_of(NODES[name].INPUT_TYPES()).values()]


@every_page
def test_a_page_tells_of_exactly_the_outputs_with_their_types(language, name):
    cls, heading = NODES[name], LANGUAGES[language].outputs
    told = [(key, said) for _, key, said in items(language, name, heading)]
    assert told == list(zip(getattr(cls, "RETURN_NAMES", ()), cls.RETURN_TYPES))
    assert sections(language, name)[heading]  # a node without outputs says so


@pytest.mark.parametrize("name", NODES)
def test_a_chinese_page_uses_the_labels_that_the_editor_shows(name):
    locale = read("zh", "nodeDefs")[name]
    words, cls = LANGUAGES["zh"], NODES[name]
    assert {key: label for label, key, _ in items("zh", name, words.inputs)} == {k: v["name"] for k, v in locale["inputs"].items()}
    names = [locale["outputs"][str(i)]["name"] for i in range(len(cls.RETURN_TYPES))]
    assert [label for label, _, _ in items("zh", name, words.outputs)] == names


@functools.cache
def texts_of_the_program() -> list[str]:
    """Every piece of text in the library, the nodes and the trainer; of an f-string, the pieces between its values."""
    files = [file for folder in ("comfy_dancegrpo", "nodes", "trainer") for file in (ROOT / folder).rglob("*.py")]
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files]
    return [n.value for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]


def error_lines(language: str, name: str) -> list[str]:
    """The lines of the program that a page quotes, with … for what changes."""
    return [match[1] for line in sections(language, name)[LANGUAGES[language].problems] if (match := re.match(r"- `([^`]+)`", line))]


@every_page
def test_the_errors_on_a_page_are_the_program_s_own_words(language, name):
    for line in error_lines(language, name):
        parts = line.split("…")
        assert max(map(len, parts)) > 8, line
        assert [part for part in parts if not any(part in text for text in texts_of_the_program())] == [], line


@pytest.mark.parametrize("name", NODES)
def test_both_languages_tell_of_the_same_errors(name):
    assert error_lines("en", name) == error_lines("zh", name)


def test_some_page_quotes_errors():
    assert sum(len(error_lines("en", name)) for name in NODES) > 20


def test_the_runner_s_page_is_one_paragraph_that_names_its_parts():
    cls = nodes.NODE_CLASS_MAPPINGS[RUNNER]
    for language in LANGUAGES:
        page = sections(language, RUNNER)
        assert list(page) == [""] and len(page[""]) == 1
        assert set(re.findall(r"`(\w+)`", page[""][0])) == {*inputs_of(cls.INPUT_TYPES()), *cls.RETURN_NAMES}


def test_there_is_no_page_of_a_node_that_is_not_there():
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*") if path.is_file()}
    assert pages == {words.path.format(name) for words in LANGUAGES.values() for name in nodes.NODE_CLASS_MAPPINGS}


# -- the locales --------------------------------------------------------------------------------------------------------
def read(language: str, file: str) -> dict:
    """A locale's file; a key that stands twice fails."""
    def unique(pairs):
        assert len(dict(pairs)) == len(pairs), pairs
        return dict(pairs)
    return json.loads((LOCALES / language / f"{file}.json").read_text(encoding="utf-8"), object_pairs_hook=unique)


def english() -> dict:
    """What locales/en/nodeDefs.json holds: the classes' own texts, in the frontend's layout."""
    return {name: _english(name, cls) for name, cls in nodes.NODE_CLASS_MAPPINGS.items()}


def _english(name: str, cls: type) -> dict:
    found = {"display_name": nodes.NODE_DISPLAY_NAME_MAPPINGS[name], "description": cls.DESCRIPTION}
    inputs = inputs_of(cls.INPUT_TYPES())
    if inputs:  # the frontend looks for "_" where a name has a dot
        found["inputs"] = {key.replace(".", "_"): {"name": key, "tooltip": item.options["tooltip"]} for key, item in inputs.items()}
    if cls.RETURN_TYPES:
        tooltips = getattr(cls, "OUTPUT_TOOLTIPS", ())
        found["outputs"] = {str(i): {"name": label, **({"tooltip": tooltips[i]} if tooltips else {})} for i, label in enumerate(cls.RETURN_NAMES)}
    return found


def flat(tree: dict, above: str = "") -> dict[str, str]:
    """Every text by its path."""
    found = {}
    for key, value in tree.items():
        found |= flat(value, f"{above}{key}.") if isinstance(value, dict) else {f"{above}{key}": value}
    return found


def test_the_english_locale_is_what_the_classes_say():
    assert flat(read("en", "nodeDefs")) == flat(english()), "python tests/test_web_docs.py writes it anew"


def test_the_chinese_locale_covers_every_node_input_and_output_and_no_more():
    found, wanted = flat(read("zh", "nodeDefs")).keys(), flat(english()).keys()
    assert (wanted - found, found - wanted) == (set(), set())


def test_the_chinese_locale_is_in_chinese():
    texts = flat(read("zh", "nodeDefs"))
    assert [text for text in texts.values() if not re.search("[\u4e00-\u9fff]", text) and text not in UNTRANSLATED] == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_categories_are_translated(language):
    found = read(language, "main")
    assert found.keys() == {"nodeCategories"}
    assert found["nodeCategories"].keys() == {part for cls in nodes.NODE_CLASS_MAPPINGS.values() for part in cls.CATEGORY.split("/")}
    assert language != "en" or all(key == value for key, value in found["nodeCategories"].items())


@pytest.mark.parametrize("language", LANGUAGES)
def test_nothing_in_a_locale_is_syntax_to_the_frontend(language):
    """The frontend compiles these texts: braces interpolate, @ links, | chooses a plural; it warns of what looks like HTML."""
    texts = flat(read(language, "nodeDefs")) | flat(read(language, "main"))
    assert {path: text for path, text in texts.items() if not text.strip() or re.search(r"[{}@|<>]", text)} == {}


@pytest.mark.parametrize("language", LANGUAGES)
def test_names_in_a_locale_are_told_apart(language):
    defs = read(language, "nodeDefs")
    titles = [node["display_name"] for node in defs.values()]
    assert len(set(titles)) == len(titles)
    for name, node in defs.items():
        labels = [item["name"] for item in node.get("inputs", {}).values()]
        assert len(set(labels)) == len(labels), name


def test_locales_hold_what_comfyui_reads():
    files = {path.relative_to(LOCALES).as_posix() for path in LOCALES.rglob("*") if path.is_file()}
    assert files == {f"{language}/{file}.json" for language in LANGUAGES for file in ("main", "nodeDefs")}


# -- how the editor finds them ------------------------------------------------------------------------------------------
def test_comfyui_is_told_the_folder():
    spec = importlib.util.spec_from_file_location("a_pack", ROOT / "__init__.py")
    door = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(door)
    assert (ROOT / door.WEB_DIRECTORY).resolve() == DOCS.parent.resolve() and "WEB_DIRECTORY" in door.__all__


def test_search_words_are_in_the_table_that_the_editor_reads():
    table = object_info(nodes.NODE_CLASS_MAPPINGS, nodes.NODE_DISPLAY_NAME_MAPPINGS)
    for name, cls in NODES.items():
        assert table[name]["search_aliases"] == cls.SEARCH_ALIASES and cls.SEARCH_ALIASES
        assert all(word.strip() and word.lower() != cls.TITLE.lower() for word in cls.SEARCH_ALIASES), name


@pytest.mark.parametrize("folder", ["web", "locales", "workflows"])
def test_the_registry_s_archive_holds_the_folder(folder):
    """.comfyignore is read as .gitignore is: a pattern without a leading slash would also leave out web/docs."""
    pathspec = pytest.importorskip("pathspec")
    ignored = pathspec.PathSpec.from_lines("gitignore", (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines())
    files = [path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*") if path.is_file()]
    assert files and [path for path in files if ignored.match_file(path)] == []
    assert ignored.match_file("tests/test_web_docs.py")


if __name__ == "__main__":
    (LOCALES / "en" / "nodeDefs.json").write_text(json.dumps(english(), ensure_ascii=False, indent=2) + "\n", encoding="utf-8")

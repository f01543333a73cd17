"""The pictures of the documentation are what the script draws, and show what the code has."""

import re
from xml.etree import ElementTree

import pytest
from draw_diagrams import IMAGES, PICTURES, PURPOSE, ROOT, STEP, ladder, main
from svg import WIDTH, Picture

NAMESPACE = "{http://www.w3.org/2000/svg}"


def test_the_committed_pictures_are_current(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["draw_diagrams.py", "--check"])
    assert main() == 0, capsys.readouterr().err


def test_every_committed_picture_is_drawn():
    assert {file.stem for file in IMAGES.iterdir()} == {draw.__name__ for draw in PICTURES}


@pytest.mark.parametrize("draw", PICTURES, ids=lambda draw: draw.__name__)
def test_a_picture_is_well_formed_and_tells_its_content_in_words(draw):
    root = ElementTree.fromstring(draw().svg())
    title, description = root.find(f"{NAMESPACE}title"), root.find(f"{NAMESPACE}desc")
    assert title.text and len(description.text) > 40
    assert root.get("viewBox").startswith(f"0 0 {WIDTH} ")


@pytest.mark.parametrize("draw", PICTURES, ids=lambda draw: draw.__name__)
def test_a_page_shows_it_with_a_text_in_its_place(draw):
    pages = "".join(page.read_text() for page in (ROOT / "docs").glob("*.md"))
    texts = re.findall(rf"!\[([^\]]*)\]\(images/{draw.__name__}\.svg\)", pages)
    assert texts and all(len(text) > 40 for text in texts)


def test_the_ladder_names_the_package_and_has_a_purpose_for_each():
    named = {name for rung in ladder() for name in rung}
    package = ROOT / "vllm_metal"
    found = {file.stem for file in package.glob("*.py")}
    found |= {file.parent.name for file in package.glob("*/__init__.py")}
    assert named == found == set(PURPOSE)


def test_the_stations_of_the_step_exist():
    files = [who for who, *_ in STEP if "/" in who or "." in who]
    assert len(files) > 8
    assert [file for file in files if not (ROOT / "vllm_metal" / file).exists()] == []


def test_what_leaves_the_picture_or_its_box_is_an_error():
    picture = Picture(40, "a picture", "nothing")
    with pytest.raises(ValueError, match="not inside"):
        picture.text(WIDTH - 10, 20, "too far right")
    with pytest.raises(ValueError, match="may need"):
        picture.labelled_box(0, 0, 60, [("a long line of text", "")])

"""docs/operations.md against the settings it lists."""

import re
from pathlib import Path

from service.common.settings import Settings

TABLE = (Path(__file__).parents[1] / "docs" / "operations.md").read_text().partition("## Settings")[2]
ROWS = {
    name.lower(): (default, text)
    for name, default, text in re.findall(r"\| `HALFQUAD_(\w+)` \| (.+?) \| (.+?) \|", TABLE)
}


def test_every_setting_is_listed_with_its_default_and_meaning() -> None:
    assert list(ROWS) == list(Settings.model_fields)
    for name, field in Settings.model_fields.items():
        default, text = ROWS[name]
        assert text == field.description
        if field.default_factory is None and name != "data_dir":
            assert default == ("none" if field.default in (None, ()) else f"`{field.default}`")

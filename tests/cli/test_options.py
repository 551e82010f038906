"""Settings classes as commands: flags, variables, renamed flags, limits, and how errors name settings."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Annotated, Literal

import pytest
from click.testing import CliRunner

from edgefed.cli.main import VERBS, verb_command
from edgefed.cli.options import SettingsCommand, command
from edgefed.cli.phrasing import to_flags
from edgefed.cli.reference import reference
from edgefed.config import Setting, check_settings
from edgefed.errors import ConfigError


@dataclasses.dataclass(kw_only=True)
class Bake:
    recipe: Annotated[Path, Setting("What to bake.", positional=True)]
    oven: Annotated[Literal["gas", "wood"] | None, Setting("Heat source.", default="gas")] = None
    heat_celsius: Annotated[int, Setting("For `oven=gas`.", minimum=20, maximum=300, formerly="heat")] = 180
    share: Annotated[float | None, Setting("Of the dough.", above=0)] = None
    toppings: Annotated[tuple[str, ...], Setting("Repeatable.", flag="topping")] = ()
    notes: Annotated[dict[str, str] | None, Setting("Python only.", hidden=True)] = None
    dry_run: Annotated[bool, Setting("Only show the steps.")] = False


@pytest.fixture
def bake():
    """The command, and what it was called with."""
    calls: list[Bake] = []

    def run(settings: Bake) -> None:
        """Bake something."""
        calls.append(settings)

    made: SettingsCommand = command("bake", Bake)(run)
    return made, calls


def test_flags_become_an_instance(bake):
    made, calls = bake
    words = ["bread.txt", "--oven", "wood", "--heat-celsius", "200", "--topping", "a", "--topping", "b", "--dry-run"]
    assert CliRunner().invoke(made, words).exit_code == 0
    expected = Bake(recipe=Path("bread.txt"), oven="wood", heat_celsius=200, toppings=("a", "b"), dry_run=True)
    assert calls == [expected]
    assert CliRunner().invoke(made, ["bread.txt"]).exit_code == 0
    assert calls[1] == Bake(recipe=Path("bread.txt"))


@pytest.mark.parametrize("words", [["join", "http://127.0.0.1:1"], ["profile", "--model", "tiny"]])
def test_a_required_option_that_is_missing_is_named(words):
    found = CliRunner().invoke(verb_command(words[0]), words[1:])
    assert found.exit_code == 2
    assert "Missing option '--data'" in found.output


def test_variables_have_the_names_of_the_flags(bake):
    made, calls = bake
    CliRunner().invoke(made, ["x"], env={"EDGEFED_BAKE_HEAT_CELSIUS": "90", "EDGEFED_BAKE_DRY_RUN": "1"})
    assert calls == [Bake(recipe=Path("x"), heat_celsius=90, dry_run=True)]


def test_help_shows_defaults_and_flags(bake):
    text = CliRunner().invoke(bake[0], ["--help"]).output
    assert "Bake something." in text
    assert "For --oven gas." in text
    assert "[default: gas]" in text
    assert "180" in text
    assert "notes" not in text


@pytest.mark.parametrize("words", [["x", "--heat-celsius", "10"], ["x", "--share", "0"], ["x", "--oven", "coal"], []])
def test_limits_are_usage_errors(bake, words):
    assert CliRunner().invoke(bake[0], words).exit_code == 2
    assert not bake[1]


def test_an_old_name_is_refused_with_a_hint(bake):
    result = CliRunner().invoke(bake[0], ["x", "--heat", "100"])
    assert result.exit_code == 2
    assert "--heat was renamed: use --heat-celsius 100" in result.output


def test_limits_hold_in_python_too():
    check_settings(Bake(recipe=Path("x"), share=0.5))
    with pytest.raises(ConfigError, match=r"`oven`: 'coal'; expected gas, wood; .*`heat_celsius`: 10; .* at least 20"):
        check_settings(Bake(recipe=Path("x"), oven="coal", heat_celsius=10))
    with pytest.raises(ConfigError, match="`share`: 0; expected more than 0"):
        check_settings(Bake(recipe=Path("x"), share=0))


def test_errors_name_settings_and_the_command_line_shows_flags():
    assert to_flags("Raise `memory` or set `expert_storage=full`.") == "Raise --memory or set --expert-storage full."
    assert to_flags('Set `train_experts="lora"`, `server_round` or `options`.') == (
        "Set --train-experts lora, --round or --option."
    )
    assert to_flags("Pass `tiny`, or see `edgefed doctor`.") == "Pass `tiny`, or see `edgefed doctor`."


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_one_summary_and_help_for_every_setting(verb):
    made = verb_command(verb)
    assert inspect.cleandoc(made.help or "").splitlines()[0] == VERBS[verb]
    assert all(field.setting.help for field in made.fields)


def test_a_device_profile_has_its_own_name():
    for verb in ("join", "bench"):
        needed = ["http://x", "--data", "y"] if verb == "join" else []
        result = CliRunner().invoke(verb_command(verb), [*needed, "--profile", "jetson-orin-nano-8gb"])
        assert result.exit_code == 2
        assert "use --device-profile jetson-orin-nano-8gb" in result.output


def test_the_reference_page_has_every_setting():
    page = reference()
    for verb in VERBS:
        section = page.partition(f"## edgefed {verb}\n")[2].partition("\n## ")[0]
        for field in verb_command(verb).fields:
            shown = field.name.upper() if field.setting.positional else f"`--{field.flag}`"
            assert f"| {shown} |" in section or f"| [{shown}] |" in section
    assert "| `--expert-storage` | `auto`, `full`, `int8`, `nf4` | auto | `EDGEFED_JOIN_EXPERT_STORAGE` |" in page
    assert "| `--token` | text |  | `EDGEFED_TOKEN` |" in page
    assert "| `--rounds` | integer at least 1 | 5 | `EDGEFED_SERVE_ROUNDS` |" in page


def test_an_optional_switch_that_is_not_given_has_no_value():
    made = verb_command("serve")
    assert made.make_context("serve", []).params["keep_optimizer"] is None
    assert made.make_context("serve", ["--keep-optimizer"]).params["keep_optimizer"] is True

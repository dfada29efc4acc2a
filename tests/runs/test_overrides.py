"""What a user types: short names, and one line with the nearest right word for what is wrong."""

from __future__ import annotations

import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import OverrideParseException
from quick_python import quick_python
from run_fixtures import ROOT, Composer, environment

import sparsegrad.sweeps
from sparsegrad.cli.console import main
from sparsegrad.cli.entry import _pick_overrides
from sparsegrad.cli.help_text import make_help
from sparsegrad.errors import UserError, check_choice, run_as_command
from sparsegrad.interrupt import is_command
from sparsegrad.runs.config import build
from sparsegrad.runs.names import with_one_amount
from sparsegrad.runs.overrides import expand_aliases, explain, list_groups, refuse_none
from sparsegrad.runs.yaml_check import check_yaml

CONF = ROOT / "conf"


def refusal(*words: str) -> str:
    """The line for words that are refused before anything is composed, or by Hydra."""
    try:
        if wrong := next((word for word in words if word.startswith("-")), None):
            raise OverrideParseException(wrong, "")
        refuse_none(words, CONF)
        with initialize_config_dir(str(CONF), version_base="1.3"):
            compose("config", expand_aliases(words))
    except UserError as error:
        return str(error)
    except Exception as error:  # what Hydra raises has many classes
        return str(explain(error, words, CONF))
    raise AssertionError(f"{words} are accepted")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("model=robertabase", "model=robertabase .*did you mean model=roberta_base"),
        ("method=lorra", r"did you mean method=lora\?"),
        ("method=peft/dorra", r"did you mean method=peft/dora\?"),
        ("method=dora", r"did you mean method=peft/dora\?"),
        ("dora", r"dora is not key=value: did you mean method=peft/dora\?"),
        ("method", r"method is not key=value: choose method=bitfit\|.*\|sparsegrad\|.*static_mask$"),
        ("method=nonsense", "method=nonsense .*choose one of .*full, .*lora_tuned"),
        ("task=colla", r"did you mean task=cola\?"),
        ("protocol=held", r"did you mean protocol=heldout\?"),
        ("tracker=wandbb", r"did you mean tracker=wandb\?"),
        ("experiment=quickstrt", r"did you mean experiment=quickstart\?"),
        ("sweep=foo", "sweep=foo .*choose one of .*quick"),
        ("model=null", "model=null .*choose one of .*minilm"),
        ("hydra/launcher=jobliib", r"did you mean hydra/launcher=joblib\?"),
        ("train.batchsize=8", r"train\.batchsize=8 .*did you mean train\.batch_size\?"),
        ("trane.lr=1", r"did you mean train\.lr\?"),
        ("modle=minilm", r"did you mean model\?"),
        ("lrr=1", r"did you mean lr\?"),
        ("epoch=1", r"did you mean epochs\?"),
        ("max_steps=5", r"did you mean protocol\.max_steps\?"),
        ("learning_rate=1", r"did you mean train\.lr\?"),
        ("method.densty=0.1", r"did you mean method\.density\?"),
        ("method.density.x=0.1", r"did you mean method\.density\?"),
        ("density=0.1 method=lora", r"density=0\.1 .*method=lora has no density; give method\.rank"),
        ("density=0.1 method=full", r"density=0\.1 .*method=full has no density"),
        ("sweep.trials=3", "no sweep is chosen.*sweep=quick"),
        ("sweep=quick sweep.trails=3", r"did you mean sweep\.trials\?"),
        ("lora", r"did you mean method=lora\?"),
        ("--hlep", r"did you mean --help\?"),
        ("--method lora", "--method lora is no option: .*write method=lora$"),
        ("--method=lora", "--method=lora is no option: .*write method=lora$"),
        ("--learning-rate 1e-4", r"--learning-rate 1e-4 .*write train\.lr=1e-4$"),
        ("--force seed=1", "--force is no option: .*write force=true$"),
        ("--no-resume", "write resume=false$"),
        ("--rank=8", "--rank=8 is no option: write settings as"),
        ("--workers 4", "--workers is no option: write settings as"),
        ("--bf16 true", r"write train\.precision=\.\.\.$"),
        ("--lora_alpha 16", "--lora_alpha is no option: write settings as"),
        ("--lr=None", r"write lr=\.\.\.$"),
        ("--zzzq", "--zzzq is no option: .*--help"),
        ("data.dir=~/x", r"data\.dir=\$HOME/x"),
        ("data.dir=a(b", "quotes"),
        ("method=lora,full", "several values.*-m to run one after the other$"),
        ("lr=1,2", "lr=1,2 .*-m to run one after the other$"),
        ("seed=1,2", "seed=1,2 .*-m to run one after the other$"),
        ("task=mrpc task.columns=a,b", r"-m .*or write 'task\.columns=\[a,b\]' for a list"),
        ("model=smollm2 model.blocks=0,1", r"or write 'model\.blocks=\[0,1\]' for a list"),
        ("++model.kinds=up,down", r"or write '\+\+model\.kinds=\[up,down\]' for a list"),
        ("model.kinds=up,down", "model=minilm has no kinds"),
        ("method=lora,", "a value is missing beside a comma; write method=lora;"),
        ("task=mrpc task.columns=a,", r"write 'task\.columns=\[a\]'$"),
        ("seed=1,,2", "a value is missing beside a comma; write seed=1,2; for several values, add -m"),
        ("data.dir=None", r"None would be a text here; write data\.dir=null$"),
        ("save_adapter=lora,None", "write save_adapter=lora,null$"),
        ("data={dir:None}", r"None would be a text here; write data={dir:null}$"),
        ("data={dir:None,cache:x}", r"write data={dir:null,cache:x}$"),
        ("~tracker.mode=None", "tracker=none has no mode"),
        ("tracker=None", r"did you mean tracker=none\?"),
        ("+train.lr=3", r"without \+, train\.lr=3"),
        ("+experiment=table5", r"write experiment=table5, without \+"),
        ("~train.foo", r"train has no foo; it has lr"),
        ("zzz=1", "zzz.*--help"),
    ],
)
def test_what_hydra_refuses_is_one_line_with_the_right_word(words: str, said: str) -> None:
    line = refusal(*words.split())
    assert re.search(said, line)
    assert "\n" not in line
    assert "use +" not in line  # Hydra's advice, which fails when followed


@pytest.mark.parametrize(
    "word", ["train.batch_size=8", "method=lora", "sweep=quick", "protocol.max_steps=5", "lr=1e-4"]
)
def test_what_is_suggested_is_accepted(conf: Composer, word: str) -> None:
    assert conf(*expand_aliases([word]))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("+train.batchsize=8", r"did you mean train\.batch_size\?"),
        ("+method.rank=3", "method=sparsegrad has no rank"),
        ("+seeed=3", r"did you mean seed\?"),
        ("train=foo", r"set its fields with train\.x=y"),
        ("train.precision=bf61", r"did you mean bf16\?"),
        ("save_adapter=x", "choose one of null, lora, sparsegrad, peft$"),
        ("model.pooling='\"None\"'", "choose one of null, mean, cls"),
        ("method.rotation_dtype=x", "choose one of null, bf16; null rotates"),
        ("method.save_dtype=x", "choose one of null, bf16; null keeps"),
        ("train.device=None", "train.device=None is not allowed: choose one of auto, cpu, cuda"),
        ("train.lr=None", "train.lr=None is not allowed: give a number"),
        ("+tracker.mode=x", "choose one of null, offline, online$"),
        ("+tracker={mode: None}", r"tracker\.mode=None .*did you mean null\?$"),
    ],
)
def test_what_hydra_accepts_is_checked_too(conf: Composer, override: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        build(conf(override))
    assert "conf/train" not in str(caught.value)  # there is no such group


def test_short_names_are_those_settings(conf: Composer) -> None:
    short = ("lr=1e-3", "batch_size=4", "epochs=2", "density=0.02", "seed=7")
    full = ("train.lr=1e-3", "train.batch_size=4", "protocol.epochs=2", "method.density=0.02", "seed=7")
    assert build(conf(*expand_aliases(short))).key == build(conf(*full)).key
    assert expand_aliases(["-m", "lr=1e-4,3e-4", "+density=0.1"]) == ["-m", "train.lr=1e-4,3e-4", "method.density=0.1"]
    assert expand_aliases(["model.lr=1", "lr_x=1", "~lr"]) == ["model.lr=1", "lr_x=1", "~lr"]


@pytest.mark.parametrize("given", ["density", "keep"])
def test_of_two_amounts_the_given_one_counts(conf: Composer, given: str) -> None:
    """SmolLM2 keeps a number of entries by default, MiniLM a share."""
    model = ("model=smollm2", "task=alpaca") if given == "density" else ("model=minilm",)
    value = "0.02" if given == "density" else "5"
    composed = conf(*model, f"method.{given}={value}")
    with pytest.raises(UserError, match="give one"):
        build(composed)
    method = build(with_one_amount(composed, {f"method.{given}"})).resolved["method"]
    assert [method["density"], method["keep"]] == ([0.02, None] if given == "density" else [None, 5])


@pytest.mark.parametrize(
    "words",
    ["", "method=lora", "method=peft", "method=sparsegrad_authors", "model=llama2_7b task=oasst1", "sweep=wide",
     "experiment=evidence_paper task=cola", "tracker=wandb"],
)  # fmt: skip
def test_help_explains_every_setting_in_80_columns(words: str) -> None:
    text = make_help(words.split(), CONF)
    assert max(map(len, text.splitlines())) <= 80
    assert "${" not in text
    settings = text.partition("Settings:")[2]
    lines = re.findall(r"^  (\w+)=(.*(?:\n {6}.*)*)", settings, re.MULTILINE)
    assert len(lines) > 40
    missing = [name for name, rest in lines if not re.search(r"(\s{2,}|\n {33})\S", rest)]
    assert missing == []


def test_help_shows_what_the_command_line_says() -> None:
    assert re.search(r"  rank=5 ", make_help(["method=lora", "method.rank=5"], CONF))
    assert re.search(r"  lr=0.003 +.*short: lr=", make_help(["lr=3e-3"], CONF))
    text = " ".join(make_help([], CONF).split())
    assert "basis=null the same as hosvd" in text
    assert "kept entries per weight of method=sparsegrad_authors" in text
    with pytest.raises(UserError, match="did you mean method=lora"):
        make_help(["method=lorra"], CONF)


def test_published_values_need_no_optuna(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    for name in [name for name in sys.modules if name.startswith("sparsegrad.sweeps.")]:
        monkeypatch.delitem(sys.modules, name)  # imported by other tests while it was there
        monkeypatch.delattr(sparsegrad.sweeps, name.rpartition(".")[2], raising=False)  # else the fresh one stays there
    fresh = runpy.run_module("sparsegrad.sweeps.hparams")
    assert fresh["find"](fresh["read_rows"]("paper"), "roberta_base", "full", "cola")


def test_options_of_hydra_are_no_overrides() -> None:
    words = ["-m", "--cfg", "job", "lr=1", "--config-dir=x", "-cd", "y", "--package", "method", "seed=2", "--hlep"]
    assert _pick_overrides(words) == ["lr=1", "seed=2", "--hlep"]


def test_sparsegrad_run_prints_one_line_for_a_mistyped_word(tmp_path: Path) -> None:
    """From another folder, as run.py does."""
    command = [quick_python(), "-m", "sparsegrad.cli", "run", "-m", "method=lora,lorra"]
    there = environment(PYTHONPATH=str(ROOT))
    done = subprocess.run(command, cwd=tmp_path, env=there, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch("error: .*did you mean method=lora.*\n", done.stderr)


def test_choices_come_with_the_nearest_one() -> None:
    with pytest.raises(UserError, match=r"engine=exat .*exact, layer, fast; did you mean exact\?"):
        check_choice("engine", "exat", ("exact", "layer", "fast"))


def test_none_in_a_yaml_file_is_refused_unless_it_is_quoted(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("a: null\nb: 'None'\nc: !!str None\n")
    check_yaml(path)
    path.write_text("a: null\nb: None\n")
    with pytest.raises(UserError, match=r"mine\.yaml cannot be read \(line 2: None is a text in YAML; write null"):
        check_yaml(path)


def test_a_text_that_looks_like_a_choice_is_shown_as_one() -> None:
    with pytest.raises(UserError, match=r"^dtype='None' is not allowed: choose one of None, 3; did you mean None\?$"):
        check_choice("dtype", "None", (None, 3))


def interrupt() -> int:
    raise KeyboardInterrupt


def test_a_command_ends_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_as_command(lambda: None) == 0
    assert run_as_command(interrupt, "interrupted: nothing is lost") == 130
    assert capsys.readouterr().err.strip() == "interrupted: nothing is lost"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["python", "-m", "sparsegrad.assets"], True),
        (["python", "-m", "experiments.bench", "--quick"], True),
        (["python", "/x/bin/sparsegrad", "records"], True),
        (["python", "-u", str(ROOT / "run.py"), "method=lora"], True),
        (["python", "-m", "pytest"], False),
        (["python", "-u", "-X", "dev", "-W", "error", "-m", "sparsegrad.cli"], True),
        (["python", "train.py", "-m", "x"], False),
        (["python", "-u", "train.py", "-m", "sparsegrad"], False),
        (["python", "-X", "dev", "/x/bin/mine", "-m", "sparsegrad"], False),
        (["python", "-c", "import sparsegrad", "-m", "sparsegrad"], False),
        (["python", "-m", "mine", "-m", "sparsegrad"], False),
        (["python", "/x/run.py"], False),
    ],
)
def test_only_our_commands_change_how_python_ends(words: list[str], expected: bool) -> None:
    script = next((word for word in words if word.endswith(".py")), None)
    assert is_command(words, script) == expected


@pytest.mark.parametrize("command", [("run.py",), ("-m", "sparsegrad.assets"), ("-m", "experiments.bench")])
def test_ctrl_c_while_torch_is_imported_is_one_line(command: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt\n")  # the moment at which the user presses it
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment(PYTHONPATH=str(tmp_path)),
        capture_output=True,
        check=False,
    )
    assert done.returncode in (130, -signal.SIGINT)
    assert done.stderr.split() == [b"interrupted"]


def test_the_command_names_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert all(
        re.search(rf"^ +{name} ", shown, re.MULTILINE) for name in ("run", "records", "sweeps", "assets", "report")
    )


def test_a_mistyped_command_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recrods", "outputs"]) == 2
    assert re.fullmatch(r"error: sparsegrad recrods .*did you mean sparsegrad records\?\n", capsys.readouterr().err)


def test_every_group_has_options() -> None:
    assert all(list_groups(CONF).values())
    assert "peft/dora" in list_groups(CONF)["method"]

"""`python -m experiments.mtbench answer | judge | show`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from experiments.mtbench.client import Endpoint
from experiments.mtbench.judge import Grading, Tally, cost, estimate, grade, judgments_path, make_tasks
from experiments.mtbench.lines import only_writer
from experiments.mtbench.schema import load_answers, load_prompts, load_questions, select
from experiments.mtbench.scores import ModelScores, compute_scores
from sparsegrad.errors import UserError, check_choice, check_integer, check_number

OUT = Path("results/mtbench")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Status 0; 1 if turns lack a verdict; 2 after bad input; 75 if another process is doing the same; 130 after Ctrl-C.
    """
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print("\ninterrupted: the same command continues", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m experiments.mtbench", description="MT-Bench: answer, judge, show.")
    commands = parser.add_subparsers(required=True)
    _answer_options(commands.add_parser("answer", help="let a model answer the questions"))
    _judge_options(commands.add_parser("judge", help="let a judge grade a model's answers"))
    show = commands.add_parser("show", help="mean grades of every model")
    show.add_argument("--out", type=Path, default=OUT, help="folder of answers and verdicts (default %(default)s)")
    show.set_defaults(run=_show)
    return parser


def _answer_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="folder, hub id or asset:NAME")
    parser.add_argument("--name", required=True, help="name of the model in tables and of its answers file")
    parser.add_argument("--questions", type=Path, help="JSON lines (default: MT-Bench's 80)")
    parser.add_argument("--ids", nargs="+", metavar="ID", help="only these questions")
    parser.add_argument("--out", type=Path, default=OUT, help="folder (default %(default)s)")
    parser.add_argument("--format", default="auto", help="auto, chat or inst")
    parser.add_argument("--max-new-tokens", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--dtype", default="auto", help="auto (bfloat16 on a GPU), float32, bfloat16 or float16")
    parser.set_defaults(run=_answer)


def _judge_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--answers", type=Path, required=True, help="OUT/model_answer/NAME.jsonl")
    parser.add_argument("--questions", type=Path, help="the answered file (default: MT-Bench's 80)")
    parser.add_argument("--base-url", required=True, help="for example http://localhost:8000/v1")
    parser.add_argument("--model", required=True, help="the judge's model name on that server")
    parser.add_argument(
        "--key-env", default="OPENAI_API_KEY", help="environment variable with the API key (default %(default)s)"
    )
    parser.add_argument("--price-in", type=float, help="price per million prompt tokens")
    parser.add_argument("--price-out", type=float, help="price per million completion tokens")
    parser.add_argument("--per-minute", type=float, help="maximum number of requests per minute")
    parser.add_argument("--workers", type=int, default=4, help="parallel requests (default %(default)s)")
    parser.add_argument("--attempts", type=int, default=6, help="attempts per verdict (default %(default)s)")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds per attempt (default %(default)s)")
    parser.add_argument("--backoff", type=float, default=1.0, help="first pause between two attempts, in seconds")
    parser.add_argument("--max-tokens", type=int, default=2048, help="maximum number of tokens per verdict")
    parser.add_argument(
        "--token-field",
        default="max_tokens",
        help="request field for --max-tokens; some judges need max_completion_tokens",
    )
    parser.add_argument(
        "--no-temperature", action="store_true", help="omit the temperature, for judges that reject temperature=0"
    )
    parser.add_argument("--retry-gaps", action="store_true", help="ask again where a verdict contains no grade")
    parser.add_argument("--dry-run", action="store_true", help="only estimate requests, tokens and cost")
    parser.add_argument("--yes", action="store_true", help="start without asking")
    parser.set_defaults(run=_judge)


def _answer(options: argparse.Namespace) -> int:
    from experiments.mtbench.answer import answer_questions, answers_path, check_settings, describe
    from experiments.mtbench.generation import FORMATS, Writer, pick_dtype
    from sparsegrad.models.source import find_source
    from sparsegrad.trainer.quiet import quiet_transformers

    path = answers_path(options.out, options.name)
    check_choice("format", options.format, FORMATS)
    check_integer("max_new_tokens", options.max_new_tokens, at_least=1)
    check_integer("batch_size", options.batch_size, at_least=1)
    check_integer("seed", options.seed, at_least=0)
    questions = select(load_questions(options.questions), options.ids)
    source, dtype = find_source(options.model), pick_dtype(options.dtype, options.device)
    given = {name: getattr(options, name) for name in ("model", "format", "max_new_tokens", "batch_size", "seed")}
    # The content of the model counts, not only its name: a folder can be changed in place.
    settings = describe(questions, **given, source=source.identity, dtype=str(dtype).removeprefix("torch."))
    quiet_transformers()
    how = {name: getattr(options, name) for name in ("format", "max_new_tokens", "device")}

    def load() -> Writer:
        writer = Writer.load(source, **how, dtype=dtype)
        check_settings(path, settings)  # writes a file, so only after the model could be loaded
        return writer

    asked = {"name": options.name, "size": options.batch_size, "seed": options.seed}
    with only_writer(path):
        if path.exists():
            check_settings(path, settings)
        added = answer_questions(questions, load, path, **asked)
    print(f"{added} answers added, {len(questions)} in {path}")
    return 0


def _judge(options: argparse.Namespace) -> int:
    prices, endpoint = _prices(options), _endpoint(options)
    check_integer("workers", options.workers, at_least=1)
    tasks = make_tasks(load_answers(options.answers), load_questions(options.questions), load_prompts())
    path = judgments_path(_folder(options.answers), options.model)
    grading = Grading(path, options.model, retry_gaps=options.retry_gaps)
    todo = grading.missing(tasks)
    takes = estimate(todo, endpoint.max_tokens, prices)
    money = "" if takes.money is None else f", at most {takes.money:.2f} (in the currency of the prices)"
    print(f"{len(tasks)} turns, {len(tasks) - len(todo)} judged before; to ask: {takes.requests} requests, about")
    print(f"{takes.prompt_tokens:,} prompt tokens, at most {takes.completion_tokens:,} completion tokens{money}")
    if options.dry_run or not todo:
        return 0
    _confirm(options.yes)
    with only_writer(path, options.answers.stem):  # a judge may grade several models at once
        grading = Grading(path, options.model, retry_gaps=options.retry_gaps)  # with what others have written since
        todo = grading.missing(tasks)
        tally = grade(todo, endpoint, grading, workers=options.workers)
        grading.missing(todo)  # copies the new verdicts to equal answers, of which only one was judged
    return _report(tally, prices, path)


def _report(tally: Tally, prices: tuple[float, float] | None, path: Path) -> int:
    for line in tally.failed:
        print(f"no verdict: {line}", file=sys.stderr)
    paid = cost(tally.prompt_tokens, tally.completion_tokens, prices)
    used = f"{tally.prompt_tokens:,} + {tally.completion_tokens:,} tokens" + ("" if paid is None else f", {paid:.4f}")
    print(f"{tally.graded} graded, {tally.unparsable} without a grade, {len(tally.failed)} failed; used {used}; {path}")
    return 1 if tally.failed else 0


def _folder(answers: Path) -> Path:
    """The folder of model_answer/, or of the answers file if it is elsewhere; verdicts are stored there."""
    return answers.parent.parent if answers.parent.name == "model_answer" else answers.parent


def _prices(options: argparse.Namespace) -> tuple[float, float] | None:
    if options.price_in is None and options.price_out is None:
        return None
    if options.price_in is None or options.price_out is None:
        raise UserError("give both --price-in and --price-out, or neither")
    return tuple(check_number(n, getattr(options, n), at_least=0) for n in ("price_in", "price_out"))  # type: ignore[return-value]


def _endpoint(options: argparse.Namespace) -> Endpoint:
    names = ("base_url", "model", "max_tokens", "token_field", "attempts", "timeout", "backoff", "per_minute")
    return Endpoint(
        **{name: getattr(options, name) for name in names},
        key=os.environ.get(options.key_env) or None,
        temperature=None if options.no_temperature else 0.0,
    )


def _confirm(yes: bool) -> None:
    if yes:
        return
    if not sys.stdin.isatty():
        raise UserError(
            "cannot ask whether to start, as stdin is not a terminal: give --yes, or --dry-run for the estimate alone"
        )
    if input("start? [y/N] ").strip().lower() not in ("y", "yes"):
        raise UserError("not started")


def _show(options: argparse.Namespace) -> int:
    if not (found := compute_scores(options.out)):
        raise UserError(f"no answers in {options.out}: create some with `python -m experiments.mtbench answer`")
    Console().print(table(found))
    return 0


def table(found: Sequence[ModelScores]) -> Table:
    """The scores as a table with one column per model and judge."""
    categories = sorted({name for one in found for name in one.categories})
    grid = Table("", *(one.model for one in found))
    grid.add_row("judge", *(one.label for one in found))
    grid.add_row("all", *(_format_grade(one.mean) for one in found))
    grid.add_row("turn 1", *(_format_grade(one.turn1) for one in found))
    grid.add_row("turn 2", *(_format_grade(one.turn2) for one in found), end_section=True)
    for name in categories:
        grid.add_row(name, *(_format_grade(one.categories.get(name)) for one in found))
    grid.add_section()
    grid.add_row("turns judged", *(str(one.judged) for one in found))
    grid.add_row("verdict without a grade", *(str(one.unparsable) for one in found))
    grid.add_row("no verdict", *(str(one.unjudged) for one in found))
    return grid


def _format_grade(mean: float | None) -> str:
    return "-" if mean is None else f"{mean:.2f}"

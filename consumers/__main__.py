"""`python -m consumers`: make the artefacts, run every engine on them, compare with lint, write docs/consumers.md.

Exit status 0 if each artefact is computed right or was refused by lint by name, and lint refuses nothing that works.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from consumers.artefacts import make_all
from consumers.engines import ENGINES, ENVIRONMENTS, ROOT, TRUTH, Engine, ask, forget_changed
from consumers.jobs import Answer, Job, LogProbs, Work, read_answer
from consumers.models import VOCABULARY
from consumers.table import cell, page, tidy
from consumers.verdicts import SAME, Linted, Outcome, judge, lint_all, reference
from consumers.workshop import Artefact

# How long the last whole run took, in seconds.
_DURATION = ENVIRONMENTS / "duration.txt"
_LENGTHS = (3, 5, 8, 13, 21, 34)


def main(arguments: Sequence[str]) -> int:
    """Run it all; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m consumers", description=__doc__)
    parser.add_argument("--only", default="", metavar="TEXT", help="artefacts with this in their name; writes no page")
    parser.add_argument("--engines", default="", metavar="A,B", help="these engines only; writes no page")
    parser.add_argument("--keep", action="store_true", help="ask only about what is not as it was")
    parser.add_argument("--docs", action="store_true", help="write docs/consumers.md")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    wanted = options.engines.split(",") if options.engines else [engine.name for engine in ENGINES]
    engines = [engine for engine in ENGINES if engine.name in wanted]
    for engine in engines:
        if not engine.installed:
            print(f"{engine.title} is not installed: make .consumers/{engine.environment}/.ready", file=sys.stderr)
    engines = [engine for engine in engines if engine.installed]
    work = ENVIRONMENTS / "work"
    if not options.keep:
        shutil.rmtree(work / "answers", ignore_errors=True)
    shutil.rmtree(work / "made", ignore_errors=True)
    shop = make_all(work / "made", options.only)
    artefacts = shop.made
    prompts = _prompts()
    _ask(TRUTH, shop.needed, prompts, work)
    for engine in engines:
        begun = time.monotonic()
        _ask(engine, shop.needed if engine.name == "peft" else artefacts, prompts, work)
        print(f"{engine.title}: {time.monotonic() - begun:.0f} s", file=sys.stderr)
    if not (options.keep or options.only or options.engines):
        _DURATION.write_text(str(time.monotonic() - started))
    outcomes = _outcomes(artefacts, engines, work)
    _print(artefacts, outcomes)
    if options.docs:
        versions = {engine.name: engine.versions() for engine in engines}
        (ROOT / "docs" / "consumers.md").write_text(page(shop, outcomes, versions, _cost()))
    return int(not all(outcome.agreed for outcome in outcomes.values()))


def _prompts() -> list[list[int]]:
    chance = random.Random(0)
    return [[chance.randrange(3, VOCABULARY) for _ in range(length)] for length in _LENGTHS]


def _jobs(artefacts: Sequence[Artefact], engine: Engine) -> list[Job]:
    return [
        Job(one.name, str(one.base), str(one.path) if one.is_adapter else None)
        for one in artefacts
        if not one.engines or engine.name in one.engines
    ]


def _answers(work: Path, engine: Engine, setting: str = "") -> Path:
    return work / "answers" / (engine.name + setting)


def _ask(engine: Engine, artefacts: Sequence[Artefact], prompts: list[list[int]], work: Path) -> None:
    """Ask an engine about all artefacts, and again with other settings about those it refuses for want of them."""
    jobs, folder = _jobs(artefacts, engine), _answers(work, engine)
    forget_changed(jobs, [folder, *(_answers(work, engine, f"-{words}") for words in engine.retries)])
    ask(engine, Work(prompts, jobs), folder)
    for words, settings in engine.retries.items():
        again = [job for job in jobs if words in _text(read_answer(folder, job.name))]
        ask(engine, Work(prompts, again, dict(settings)), _answers(work, engine, f"-{words}"))


def _text(answer: Answer | None) -> str:
    return answer.refusal if answer else ""


def _outcomes(artefacts: Sequence[Artefact], engines: Sequence[Engine], work: Path) -> dict[tuple[str, str], Outcome]:
    peft = next(engine for engine in ENGINES if engine.name == "peft")
    outcomes = {}
    for one in artefacts:
        asked = [engine for engine in engines if not one.engines or engine.name in one.engines]
        linted = lint_all(one.path, one.base if one.is_adapter else None, [engine.name for engine in asked])
        meaning = one.means or one.name
        truth, unmerged = (read_answer(_answers(work, engine), meaning) for engine in (TRUTH, peft))
        untouched = read_answer(_answers(work, TRUTH), f"{one.family}/saved")
        right = reference(truth, unmerged, untouched, one.group == "trained")
        for engine in asked:
            outcome = _outcome(one, engine, right, linted[engine.name], work)
            outcomes[one.name, engine.name] = outcome
    return outcomes


def _outcome(one: Artefact, engine: Engine, right: LogProbs | None, lint: Linted, work: Path) -> Outcome:
    answer = read_answer(_answers(work, engine), one.name) or Answer(refusal="no answer")
    for words, settings in engine.retries.items():
        again = read_answer(_answers(work, engine, f"-{words}"), one.name)
        if again is not None and again.logprobs is not None:
            setting = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in settings.items())
            return judge(one, engine, again, right, lint, setting)
    return judge(one, engine, answer, right, lint)


def _print(artefacts: Sequence[Artefact], outcomes: dict[tuple[str, str], Outcome]) -> None:
    """Everything as JSON beside the answers, and where engine and lint disagree on stdout."""
    everything = [outcome.as_dict() for outcome in outcomes.values()]
    (ENVIRONMENTS / "results.json").write_text(json.dumps(everything, indent=1))
    for outcome in outcomes.values():
        if not outcome.agreed:
            print(f"{outcome.artefact:32} {outcome.engine:10} {cell(outcome):30} {tidy(outcome.text, 120)}")
    same = sum(outcome.what == SAME for outcome in outcomes.values())
    disagreed = sum(not outcome.agreed for outcome in outcomes.values())
    print(f"{len(artefacts)} artefacts; {same} of {len(outcomes)} outcomes the same; {disagreed} not as lint says")


def _cost() -> str:
    """Time and disk of a whole run, in a sentence."""
    seconds = float(_DURATION.read_text()) if _DURATION.exists() else 0.0
    size = sum(path.stat().st_size for path in ENVIRONMENTS.rglob("*") if path.is_file() and not path.is_symlink())
    spent = f"the run took {seconds / 60:.0f} minutes on two busy cores"
    return f"With everything installed {spent}; `.consumers/` takes {size / 1e9:.1f} GB."


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

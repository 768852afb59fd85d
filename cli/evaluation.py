"""Commands that evaluate: eval and verdicts."""

from __future__ import annotations

from typing import Any

import click

import surgery
from surgery.cli.options import device, reporting
from surgery.errors import OptionError


def _names(_context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> list[str]:
    """`--adapters a,b --adapters c` as one list."""
    found = [name.strip() for value in values for name in value.split(",") if name.strip()]
    if values and not found:
        raise OptionError(f"{parameter.opts[0]} is {','.join(values)!r}, and names nothing; leave it out, or name one.")
    return found


@click.command(
    name="eval",
    epilog="""\b
Examples:
  surgery eval model --data held-out.jsonl
  surgery eval model --data held-out.jsonl --adapters law,code,chat=0.5
  surgery eval model --data held-out.jsonl --adapters law --against tuned,mixture
  surgery eval model --data requests.jsonl --adapters law,code --adapter-field tenant
  surgery eval model --data chats.jsonl --generate answers.jsonl --max-new-tokens 256
  surgery eval tuned --data chats.jsonl --against base --pairwise pairs.jsonl""",
)
@click.argument("checkpoint", metavar="CHECKPOINT", type=click.Path())
@click.option("--data", required=True, metavar="DATA", help="File, folder, or data set on the Hub, name/repo[:split].")
@click.option(
    "--adapters", multiple=True, callback=_names, metavar="A,B,...", help="On CHECKPOINT; each is a line of the table."
)
@click.option(
    "--adapter-field",
    metavar="NAME",
    help="Column that names each row's adapter; '' for none.  [default: adapter, if there is one]",
)
@click.option(
    "--against",
    multiple=True,
    callback=_names,
    metavar="A,B,...",
    help="Other checkpoints for the table, or more adapters on CHECKPOINT.",
)
@click.option(
    "--task",
    type=click.Choice(["causal-lm", "seq2seq", "classification", "image-classification"]),
    help="What to do.  [default: told from checkpoint and data]",
)
@click.option("--batch-size", type=click.IntRange(1), help="Rows of a forward pass.  [default: 8]")
@click.option(
    "--max-length", type=click.IntRange(1), help="Tokens of an example.  [default: the model's, at most 2048]"
)
@click.option(
    "--over-length",
    type=click.Choice(["error", "truncate", "skip", "split"]),
    help="What becomes of longer ones; split is for plain text.  [default: error]",
)
@click.option(
    "--loss",
    type=click.Choice(["auto", "all"]),
    help="auto: of completions and the assistant's turns.  [default: auto]",
)
@click.option("--tokenizer", metavar="PATH", help="Take the tokenizer from there.")
@click.option("--chat-template", type=click.Path(), help="Jinja file to use instead of the tokenizer's template.")
@click.option("--end-token", metavar="TEXT", help="Ends completions, texts and answers.")
@click.option("--generate", type=click.Path(), metavar="FILE", help="Let each model answer; write the answers, JSONL.")
@click.option("--max-new-tokens", type=click.IntRange(1), help="Of an answer.  [default: 128]")
@click.option("--temperature", type=click.FloatRange(0), help="Of drawing tokens; 0 takes the likeliest.  [default: 0]")
@click.option(
    "--pairwise", type=click.Path(), metavar="FILE", help="Write blinded pairs of answers for a judge; needs --against."
)
@click.option(
    "--key", type=click.Path(), metavar="FILE", help="Who wrote which.  [default: NAME.key.json beside --pairwise]"
)
@click.option("--seed", type=int, help="Of drawing tokens and of the order in pairs.  [default: 0]")
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "bf16", "fp16"]),
    help="auto: bf16 where a GPU has it.  [default: auto]",
)
@device("auto")
@click.option("-o", "--output", type=click.Path(), metavar="FILE", help="Write the report there, too, as JSON.")
@click.option("--overwrite", is_flag=True, help="Replace files that exist.")
@click.option("--dry-run", is_flag=True, help="Look at data, model and adapters, evaluate nothing.")
@reporting
def evaluate(checkpoint: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Evaluate a checkpoint, and many adapters on it in one pass.

    Loss, perplexity, bits per byte, accuracy, Matthews, F1, correlations: what the task has. Adapters that are plain
    factors share each forward pass over the frozen base, every row on its own; the others have passes of their own, and
    the report says why. Nothing is written unless a file is named.
    """
    from surgery.cli import render
    from surgery.cli.progress import make_row_progress

    given = {name: value for name, value in options.items() if value is not None}
    render.present(surgery.evaluate(checkpoint, progress=make_row_progress(quiet), **given), as_json, quiet)


@click.command(
    epilog="""\b
Examples:
  surgery verdicts pairs.jsonl --key pairs.key.json
  surgery verdicts judged.jsonl --key pairs.key.json --json"""
)
@click.argument("file", metavar="FILE", type=click.Path())
@click.option("--key", required=True, type=click.Path(), help="The file that --pairwise wrote beside the pairs.")
@reporting
def verdicts(file: str, key: str, as_json: bool, quiet: bool) -> None:
    """Count a judge's verdicts on blinded pairs of answers.

    FILE has a line of JSON for each pair, with its id and a verdict: a, b or tie. The file of pairs itself will do,
    filled in. Shares come with intervals of 95%, and the sign test says what chance alone would do.
    """
    from surgery.cli import render

    render.present(surgery.verdicts(file, key=key), as_json, quiet)

"""``python -m aar_kernels.bench [OPERATOR...]``: every operator against plain PyTorch and what else is installed.

Results are checked first; a case whose results are wrong is not timed. The numbers go to the terminal, and as JSON,
Markdown or a web page where asked for.
"""

from __future__ import annotations

import argparse
import sys
from itertools import groupby
from pathlib import Path

from . import page, tables
from .compare import Comparison, compare
from .measure import machine
from .rows import Results, Row
from .run import run
from .shapes import BATCHES, DTYPES, LATENTS, SHAPES

BENCHMARKS = ("quantization", "attention", "modulation", "sampling", "linear", "transformer", "codecs")
SWEPT = ("batch", "length", "scales", "codes", "latent", "channels", "rows")


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    unknown = set(arguments.benchmark) - set(BENCHMARKS)
    if unknown:
        parser.error(f"unknown benchmark {', '.join(sorted(unknown))}; one of {', '.join(BENCHMARKS)}")
    if arguments.fail_if_slower and not arguments.compare:
        parser.error("--fail-if-slower needs --compare")
    if arguments.sweep and arguments.shapes != "sweep":
        parser.error("--sweep needs --shapes sweep")
    arguments.batch = arguments.batch or BATCHES[arguments.shapes]
    arguments.latent = arguments.latent or LATENTS[arguments.shapes]

    try:
        old = Results.load([arguments.compare]) if arguments.compare else None
        results = Results.load(arguments.report) if arguments.report else Results(machine())
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print("; ".join(f"{key}: {value}" for key, value in results.machine.items()))
    if arguments.report:
        for (name, threads), rows in groupby(results.rows, lambda row: (row.benchmark, row.threads)):
            print("\n".join([f"\n{name}, {threads} thread(s)", tables.header(), *map(tables.text, rows)]))
    else:
        _measure(arguments, results)

    comparison = compare(old, results) if old else None
    print(tables.closing_text(results, comparison))
    _write(arguments, results, comparison)
    slower = comparison is not None and arguments.fail_if_slower and comparison.count("slower") > 0
    return 1 if results.wrong or slower else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m aar_kernels.bench", description=__doc__)
    parser.add_argument("benchmark", nargs="*", default=list(BENCHMARKS), help=f"of {', '.join(BENCHMARKS)}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads (default: 1 2)")
    parser.add_argument("--shapes", choices=SHAPES, default="paper", help="those of the paper; small ones, to see that "
                        "all runs; or the paper's with one size changed at a time (default: paper)")  # fmt: skip
    parser.add_argument("--sweep", choices=SWEPT, nargs="+", help="with --shapes sweep: the sizes to change "
                        "(default: all that an operator has)")  # fmt: skip
    parser.add_argument("--batch", type=int, nargs="+", help="batch sizes (default: 1 8 32; small: 2)")
    parser.add_argument("--latent", type=int, nargs="+", help="of the quantizer (default: 64 128; small: 16)")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", help="those alone, where there is a kernel for them")
    parser.add_argument("--peers", nargs="+", metavar="WORD", help="time only peers whose name has one of the words")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes minutes")
    parser.add_argument("--seconds", type=float, default=1.0, help="measuring time per variant (default: 1)")
    parser.add_argument("--json", type=Path, help="also write the numbers here, anew after each case")
    parser.add_argument("--markdown", type=Path, help="also write tables here")
    parser.add_argument("--html", type=Path, help="also write a page with plots here")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="say what became faster or slower since")
    parser.add_argument("--fail-if-slower", action="store_true", help="with --compare: exit with 1 if anything did")
    parser.add_argument("--report", type=Path, nargs="+", metavar="RUN.json",
                        help="measure nothing: report what earlier runs wrote")  # fmt: skip
    return parser


def _measure(arguments: argparse.Namespace, results: Results) -> None:
    def begin(title: str) -> None:
        print(f"\n{title}\n{tables.header()}", flush=True)

    for row in run(arguments.benchmark, arguments, begin):
        if isinstance(row, Row):
            results.rows.append(row)
            print(tables.text(row), flush=True)
        else:
            results.wrong.append(row)
            print(tables.wrong_text(row), flush=True)
        if arguments.json:
            results.save(arguments.json)


def _write(arguments: argparse.Namespace, results: Results, comparison: Comparison | None) -> None:
    if arguments.json:
        results.save(arguments.json)
    if arguments.markdown:
        arguments.markdown.write_text(tables.markdown(results, comparison))
    if arguments.html:
        arguments.html.write_text(page.render(results, comparison))


if __name__ == "__main__":
    sys.exit(main())

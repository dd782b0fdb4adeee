"""The benchmarks' command: ``python -m benchmarks ops | step | table | freeze | plot | cpu_ratio``, and ``--help``.

Status 0: the command succeeded, and every number of ours was right; 1: not so; 2: the arguments are invalid.
"""

from __future__ import annotations

import argparse
import sys

from benchmarks import cpu_ratio, freeze, ops, plots, step, table


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["cpu_ratio"]:
        return cpu_ratio.main(arguments[1:])
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in {"ops": ops, "step": step, "table": table, "freeze": freeze, "plot": plots}.items():
        paragraphs = (module.__doc__ or "").split("\n\n")
        command = commands.add_parser(
            name,
            help=paragraphs[0].split(": ", 1)[1],
            description="\n\n".join(paragraphs),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    commands.add_parser("cpu_ratio", help=(cpu_ratio.__doc__ or "").split("\n")[0], add_help=False)
    options = parser.parse_args(arguments)
    try:
        status: int = options.run(options)
    except (ValueError, OSError) as error:
        parser.exit(2, f"python -m benchmarks {options.command}: {error}\n")
    return status


if __name__ == "__main__":
    sys.exit(main())

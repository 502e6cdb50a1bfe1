"""python -m oq2vl_jax.curate.filter RULES.toml: makes a set of sample ids and a report from metadata and scores.

RULES.toml:    expression = "clip_l14_top(0.3) & basic | mlm(semantic_understanding >= 85) | uids(dfn.npy)"
               seed = 0                  # for ties of exact top fractions
               [basic]                   # optional; DataComp's values are the defaults
               min_short_side = 200

Writes OUT/uids.npy (DataComp's sorted u8,u8), OUT/report.json and OUT/report.html. filter/rules.py lists the rules.
"""

from oq2vl_jax.bounds import parse
from oq2vl_jax.curate.filter.run import FilterCommand, input_files, run_filter
from oq2vl_jax.data.samples.parquet import in_own_process
from oq2vl_jax.errors import run_command


def main() -> None:
    command = parse(FilterCommand, prog="python -m oq2vl_jax.curate.filter")
    report = in_own_process(run_filter, command, lambda: [file for files in input_files(command) for file in files])
    print(
        f"{report['kept']:,} of {report['samples']:,} samples kept ({report['kept'] / max(report['samples'], 1):.1%}), "
        f"{report['uids']:,} ids in {command.out}/uids.npy; samples without a valid id: {report['invalid_uids']:,}; "
        f"report: {command.out}/report.html"
    )
    for column, number in report["conflicting_scores"].items():
        print(f"{number:,} scores of {column} were left out: the sample has another one in an earlier row.")


if __name__ == "__main__":
    run_command(main)

"""python -m oq2vl_jax.bench packing: measurements of the parts, printed as a table or as JSON.

packing   bin assignment alone
pack      tars to packed rows, end to end, against the published approach
rows      reading packed rows: random access and decoding
filter    uid membership and a filter expression over metadata
tuning    packed conversations against padded batches
decode    generation, against transformers' generate on the exported model
"""

import json

from oq2vl_jax.errors import run_command


def main() -> None:
    import tyro

    from oq2vl_jax.bench import decode, filter, pack, packing, rows, tuning

    benches = {
        packing.Packing: packing.measure,
        pack.Pack: pack.measure,
        rows.Rows: rows.measure,
        filter.Filter: filter.measure,
        tuning.Tuning: tuning.measure,
        decode.Decode: decode.measure,
    }
    kinds = {kind.__name__.lower(): kind for kind in benches}
    config = tyro.extras.subcommand_cli_from_dict(kinds, prog="python -m oq2vl_jax.bench")
    results = benches[type(config)](config)
    if config.json:
        print(json.dumps(results))
    else:
        print_table(results)


def print_table(results: list[dict]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*results[0], box=None)
    for result in results:
        table.add_row(
            *(
                f"{v:,.4g}" if isinstance(v, float) and v < 100 else f"{v:,.0f}" if isinstance(v, float) else str(v)
                for v in result.values()
            )
        )
    Console(width=160).print(table)


if __name__ == "__main__":
    run_command(main)

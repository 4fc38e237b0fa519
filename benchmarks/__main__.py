"""`python -m benchmarks [NAME]... [--quick]`, with the names below."""

import click

from benchmarks import change, kube, observability, ratelimit, report, request, routes, size, translate, xds

_BENCHMARKS = {
    "request": request.measure,
    "observability": observability.measure,
    "change": change.measure,
    "routes": routes.measure,
    "translate": translate.measure,
    "size": size.measure,
    "ratelimit": ratelimit.measure,
    "xds": xds.measure,
    "kube": kube.measure,
}


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(list(_BENCHMARKS)))
@click.option("--quick", is_flag=True, help="Few rounds and small numbers, to see whether all works.")
def main(names: tuple[str, ...], *, quick: bool) -> None:
    """Measure llmplane, each thing beside its reference (none named: all). See docs/benchmarks.md."""
    click.echo(f"{report.machine()}\n")
    for name in names or _BENCHMARKS:
        report.print_and_save(name, _BENCHMARKS[name](quick=quick), quick=quick)


if __name__ == "__main__":
    main()

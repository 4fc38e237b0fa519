"""``llmplane top``: readings of Envoys become rows of rates, quantiles and costs."""

import asyncio
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from click.testing import CliRunner
from rich.console import Console

from llmplane.cli import main
from llmplane.prices import Prices, PricesError, read_prices
from llmplane.top import Key, Traffic, read_metrics, rows, table

WHO = (
    'source_workload="sleep",source_workload_namespace="default",'
    'destination_service="api.moonshot.cn",model="kimi"'
)
SEED = (
    'llmproxy_source_workload="sleep",llmproxy_source_workload_namespace="default",'
    'llmproxy_destination_service="api.moonshot.cn",llmproxy_model="kimi"'
)
KEY = Key("sleep", "api.moonshot.cn", "kimi")
PRICES = Prices.model_validate({"models": {"kimi": {"input": "2", "output": "10", "cachedInput": "0.5"}}})


def exposition(prompt: int, completion: int, good: int, limited: int) -> str:
    """Return what Envoy's port 15090 says."""
    requests = f'{WHO},operation="chat",response_flags="-"'
    histogram = "llmplane_time_to_first_token_seconds"
    return f"""\
# TYPE envoy_cluster_upstream_cx_total counter
envoy_cluster_upstream_cx_total{{envoy_cluster_name="outbound|443||api.moonshot.cn"}} 7
# TYPE asm_llm_proxy_prompt_tokens counter
asm_llm_proxy_prompt_tokens{{{SEED}}} {prompt}
# TYPE asm_llm_proxy_completion_tokens counter
asm_llm_proxy_completion_tokens{{{SEED}}} {completion}
# TYPE llmplane_requests_total counter
llmplane_requests_total{{{requests},response_code="200"}} {good}
llmplane_requests_total{{{requests},response_code="429"}} {limited}
# TYPE {histogram} histogram
{histogram}_bucket{{{WHO},le="0.5"}} {good // 2}
{histogram}_bucket{{{WHO},le="1"}} {good}
{histogram}_bucket{{{WHO},le="+Inf"}} {good}
{histogram}_sum{{{WHO}}} 3
{histogram}_count{{{WHO}}} {good}
"""


def test_a_row_has_what_came_between_two_readings() -> None:
    before, now = read_metrics(exposition(100, 50, 4, 0)), read_metrics(exposition(300, 90, 8, 2))
    (row,) = rows([before], [now])
    assert row.key == KEY
    assert row.total.counters == {"prompt": 300, "completion": 90, "requests": 10, "errors": 2, "limited": 2}
    assert row.latest.counters == {"prompt": 200, "completion": 40, "requests": 6, "errors": 2, "limited": 2}


def test_envoys_are_added_up() -> None:
    one = read_metrics(exposition(1, 2, 3, 0))
    (row,) = rows([{}, {}], [one, one])
    assert row.total.counters["requests"] == 6


def test_an_envoy_that_started_anew_begins_at_nothing() -> None:
    before, now = read_metrics(exposition(100, 50, 4, 0)), read_metrics(exposition(7, 3, 1, 0))
    (row,) = rows([before], [now])
    assert row.latest.counters["prompt"] == 7


def test_quantiles_are_those_of_prometheus() -> None:
    traffic = Traffic()
    traffic.buckets["first_token"] = {0.5: 10, 1.0: 20, float("inf"): 20}
    assert traffic.quantile("first_token", 0.25) == 0.25
    assert traffic.quantile("first_token", 0.75) == 0.75
    assert traffic.quantile("duration", 0.5) is None


def test_a_quantile_beyond_the_last_bound_is_that_bound() -> None:
    traffic = Traffic()
    traffic.buckets["duration"] = {0.5: 0, float("inf"): 3}
    assert traffic.quantile("duration", 0.95) == 0.5


def test_cached_tokens_have_a_price_of_their_own() -> None:
    assert PRICES.cost("kimi", 1_000_000, 100_000, 400_000) == Decimal("2.4")
    assert PRICES.cost("another", 1, 1) is None


def test_the_table_shows_rates_latency_and_cost() -> None:
    now = read_metrics(exposition(1_000_000, 0, 8, 2))
    console = Console(width=200)
    with console.capture() as shown:
        console.print(table(rows([{}], [now]), 2.0, PRICES))
    header, line = shown.get().splitlines()
    assert header.split()[:5] == ["WORKLOAD", "PROVIDER", "MODEL", "REQ/S", "ERR/S"]
    assert line.split() == [
        *("sleep", "api.moonshot.cn", "kimi", "5.0", "1.0", "1.0", "-"),
        *("500,000.0", "-", "500ms", "950ms", "-", "1,000,000", "2.0000"),
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("models: {kimi: {input: -1, output: 1}}", "models.kimi.input"),
        ("models: {kimi: {input: 1}}", "models.kimi.output"),
        ("model: {}", "model"),
        ("models: [", "while parsing"),
    ],
)
def test_a_wrong_price_table_names_file_and_field(tmp_path: Path, text: str, problem: str) -> None:
    file = tmp_path / "prices.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(PricesError) as refused:
        read_prices(file)
    assert str(file) in str(refused.value)
    assert problem in str(refused.value)


async def test_it_shows_an_envoy_and_names_one_that_is_not_there(tmp_path: Path) -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(text=exposition(10, 5, 1, 0))

    application = web.Application()
    application.router.add_get("/stats/prometheus", answer)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]

    def top(*arguments: str) -> Any:
        return CliRunner().invoke(main, ["top", "--once", "--interval", "0.5", *arguments])

    try:
        there = await asyncio.to_thread(top, f"127.0.0.1:{port}")
        silent = await asyncio.to_thread(top, f"127.0.0.1:{port}", "127.0.0.1:1")
    finally:
        await runner.cleanup()
    assert there.exit_code == 0, there.output
    assert "api.moonshot.cn" in there.output
    assert silent.exit_code == 1
    assert "127.0.0.1:1" in silent.output

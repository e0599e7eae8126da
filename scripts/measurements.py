"""Reports of the benchmarks as Markdown, for docs/benchmarks.md: a table per kind, and the pictures beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.peers_table import header_of, rows_of
from bench.report import RESULTS, Report, markdown_table


def results(reports: Sequence[Report]) -> str:
    """A section per machine."""
    if not reports:
        return "Nothing has been published from here yet."
    parts = []
    for name in sorted({str(report.machine["name"]) for report in reports}):
        own = [report for report in reports if report.machine["name"] == name]
        about: Any = own[0].machine
        versions = ", ".join(f"{package} {version}" for package, version in about["versions"].items())
        parts.append(f"### {about['processor']}, {about['cores']} cores, {about['memory_gib']} GiB")
        parts.append(f"Python {about['python']}, {versions}.")
        parts.append(offline_table([report for report in own if report.benchmark == "offline"]))
        parts.append(compared_table([report for report in own if report.benchmark in ("turns", "experts")]))
        for benchmark, part in PARTS.items():
            parts += [part(report) for report in own if report.benchmark == benchmark]
    return "\n\n".join(part for part in parts if part)


def offline_table(reports: Sequence[Report]) -> str:
    rows = []
    for report in reports:
        config, numbers = report.config, report.numbers
        rows.append(
            (
                config["model"],
                config["dtype"],
                requests_of(config),
                f"{config['data_parallel_size']} x {config['tensor_parallel_size']}"
                + (" ep" if config["enable_expert_parallel"] else ""),
                _median(numbers, "moe_serve_output_tokens_per_second"),
                _median(numbers, "transformers_output_tokens_per_second"),
                _median(numbers, "ratio"),
                f"{numbers['equal_answers']} of {numbers['answers']}" if "answers" in numbers else "",
                f"`{report.commit}`",
            )
        )
    header = ["model", "type", "requests x in / out", "dp x tp", "LLM, tokens/s", "transformers, tokens/s", "ratio"]
    return markdown_table([*header, "answers equal", "commit"], rows) if rows else ""


def compared_table(reports: Sequence[Report]) -> str:
    """Two checkouts by turns: a row per number. Only the ratio of neighbours compares."""
    rows = [
        (
            report.config["benchmark"],
            requests_of(report.config) if report.benchmark == "turns" else name.split(",")[0],
            *(f"{compared[side]:.4g}" for side in ("before", "after")),
            f"{compared['ratio']:.2f}",
            " to ".join(f"{quartile:.2f}" for quartile in compared["ratio_quartiles"]),
            f"`{report.config['before']}` `{report.config['after']}`",
        )
        for report in reports
        for name, compared in _numbers(report).items()
    ]
    header = ["tokens or passes per second", "requests x in / out", "before", "after", "ratio", "quartiles", "commits"]
    return "Two checkouts by turns.\n\n" + markdown_table(header, rows) if rows else ""


def requests_of(config: Mapping[str, Any]) -> str:
    return f"{config['num_requests']} x {config['input_len']} / {config['output_len']}"


def peers_part(report: Report) -> str:
    """Us beside other engines: a row per workload."""
    config, numbers = report.config, _numbers(report)
    left_out = "".join(f" Left out: {name}, {why}." for name, why in numbers["left_out"].items())
    return "\n\n".join(
        part
        for part in (
            f"Beside other engines, `{report.label}`: the same random weights and prompts in {config['dtype']}, "
            f"{config['threads']} threads, medians of {config['turns']} turns, load before "
            f"{report.machine['load_before']}, commit `{report.commit}`. A ratio is ours to theirs in the same turn, "
            f"quartiles in brackets; above one moe-serve is faster.{left_out}",
            markdown_table(header_of(report), rows_of(report)),
            _picture(report, "Output tokens per second over the number of requests"),
        )
        if part
    )


def startup_part(report: Report) -> str:
    """Seconds from the command to the curl line."""
    numbers: Any = report.numbers
    rows = [(name, figures["median_s"], ", ".join(map(str, figures["all_s"]))) for name, figures in numbers.items()]
    return (
        f"From the command to the curl line, `{report.label}`, commit `{report.commit}`; seconds.\n\n"
        + markdown_table(["engines", "median", "all"], rows)
    )


def serve_part(report: Report) -> str:
    """One server's table and picture."""
    config: Any = report.config
    rates: Any = report.numbers["rates"]
    rows = [
        (
            f"{row['rate']:g}",
            f"{row['requests_per_second']:g}",
            f"{row['output_tokens_per_second']:g}",
            *(_percentiles(row[name]) for name in ("ttft_ms", "itl_ms", "e2e_ms")),
            row["failed"],
        )
        for row in rates
    ]
    header = ["requests/s", "answered/s", "tokens/s", "first token", "between tokens", "whole answer", "failed"]
    return (
        f"`{report.label}`: {config['input_len']} tokens in, {config['output_len']} out, {config['seconds']:g} s per "
        f"rate, commit `{report.commit}`; milliseconds, p50 / p90 / p99.\n\n{markdown_table(header, rows)}\n\n"
        + _picture(report, "Latency over the rate of requests")
    )


def stall_part(report: Report) -> str:
    """Gaps between tokens at rest and while experts move."""
    config, numbers = report.config, _numbers(report)
    rows = [
        (title, *(f"{numbers[name][key]:.1f}" for key in ("p50", "p90", "p99", "max")), numbers[name]["gaps"])
        for name, title in (("at_rest_ms", "at rest"), ("during_ms", "while experts move"))
    ]
    rows.append(("ratio", *(f"{numbers['ratio'][key]:.2f}" for key in ("p50", "p90", "p99", "max")), ""))
    return (
        f"Gaps between tokens while experts move, `{report.label}`, dp={config['dp']}, {config['clients']} streams: "
        f"{numbers['rearrangements']} rearrangements, {numbers['moved_experts']} experts, longest commit "
        f"{numbers['longest_commit_ms']:.1f} ms, commit `{report.commit}`; milliseconds.\n\n"
        + markdown_table(["", "p50", "p90", "p99", "longest", "gaps"], rows)
        + "\n\n"
        + _picture(report, "Gaps between tokens over time, rearrangements shaded")
    )


def topics_part(report: Report) -> str:
    """A server that balances beside one that moves nothing, under traffic that changes its topic."""
    config, numbers = report.config, _numbers(report)
    rows = []
    for policy in ("static", str(config["policy"])):
        side = numbers[policy]
        rows.append(
            (
                "nothing moves" if policy == "static" else policy,
                f"{side['tokens_per_second']:.1f}",
                f"{side['mean_balancedness']:.3f}",
                _percentiles(side["gaps_ms"]),
                side["rearrangements"],
                side["moved_experts"],
            )
        )
    header = ["", "tokens/s", "balancedness", "between tokens, ms", "rearrangements", "experts moved"]
    speed, modelled = numbers["ratio"]["tokens_per_second"], numbers["modelled_expert_speedup"]
    parts = [
        f"Traffic that changes its topic every {config['stretch']:g} s, `{report.label}`, dp={config['dp']}, "
        f"{config['redundant']} redundant experts, commit `{report.commit}`. Tokens per second: {speed:.3f} times "
        f"those without. Modelled, if only the slowest rank's rows count: experts {modelled:.3f} times as fast.",
        markdown_table(header, rows),
        _picture(report, "Balancedness over time with and without load balancing"),
    ]
    return "\n\n".join(part for part in parts if part)


def gain_part(report: Report) -> str:
    """Servers with hot experts put together, balancing, and balanced from the start, by turns on a core per rank."""
    config, numbers = report.config, _numbers(report)
    rows = [
        (name, speeds["median"], f"{numbers['speed_up'].get(name, 1.0):.2f}", ", ".join(map(str, speeds["all"])))
        for name, speeds in numbers["tokens_per_second"].items()
    ]
    modelled, reached = numbers["modelled_speed_up"], numbers["reached"]
    models = {"rows_alone": "if only the slowest rank's rows count", "gate": "by what the server decides by"}
    told = [
        f"{words} {modelled[name]:.2f}" + (f", of which {reached[name]:.0%} were reached" if name in reached else "")
        for name, words in models.items()
    ]
    moved = f"{numbers['rearrangements']} rearrangements, {numbers['moved_experts']} experts."
    refused = f" Refused at last: {numbers['refused'][-1]}." if numbers["refused"] else ""
    return (
        f"Load balancing on a core per rank, `{report.label}`: dp={config['ranks']}, {config['requests']} x "
        f"{config['input_len']} / {config['output_len']} tokens in {config['dtype']}, balancedness "
        f"{numbers['balancedness_linear']:.2f} with the linear placement, commit `{report.commit}`. Modelled speed-up: "
        f"{'; '.join(told)}. {moved if numbers['rearrangements'] else 'Here nothing was moved.'}{refused}\n\n"
        + markdown_table(["", "tokens/s", "times", "turns"], rows)
    )


def balancedness_part(report: Report) -> str:
    """All policies on made-up and recorded loads."""
    config, numbers = report.config, _numbers(report)
    replayed = [
        (
            name,
            outcome["num_redundant"],
            outcome["policy"],
            f"{outcome['balancedness']:.4f}",
            f"{outcome['balancedness_uneven']:.4f}",
            f"{outcome['moved_share'] * 100:.1f}",
            f"{outcome['cross_node_moves']:.0f}",
        )
        for name, outcomes in numbers["replays"].items()
        for outcome in outcomes
        if outcome["policy"] != "shuffle"
    ]
    header = ["load", "redundant", "policy", "balanced, even shares", "uneven shares", "moved, %", "over nodes"]
    fresh, solve = numbers["from_nothing"], numbers["solve_ms"]
    columns = list(next(iter(solve.values()), {}))
    made_up = (
        f"{config['layers']} layers of {config['experts']} experts, {config['tokens']} tokens a step, "
        f"{config['windows']} windows of {config['steps']} steps"
    )
    loads = made_up if fresh else f"a recorded load in {config['windows']} windows"
    parts = [
        f"Policies at a desk, `{report.label}`: {loads}, {config['ranks']} ranks, nodes: {config['nodes']}, commit "
        f"`{report.commit}`. Planned on one window, scored on the steps of the next.",
        markdown_table(header, replayed),
        *(_picture(report, f"{name}: balancedness and moves", f"eplb-{name}") for name in numbers["replays"]),
        "From nothing, scored on the load planned on; in brackets, copies that share a rank." if fresh else "",
        _fresh_table(fresh) if fresh else "",
        _picture(report, "Expert by rank before and after", "eplb-heat"),
        "Time to solve, the least of several runs on one thread; milliseconds.",
        markdown_table(["world", *columns], [[world, *times.values()] for world, times in solve.items()]),
    ]
    return "\n\n".join(part for part in parts if part)


def _fresh_table(fresh: Sequence[Mapping[str, object]]) -> str:
    """A column per policy, with the copies that share a rank in brackets."""
    policies = [name.removesuffix("_duplicates") for name in (fresh[0] if fresh else ()) if "_duplicates" in name]
    rows = [
        (row["load"], row["redundant"], *(f"{row[name]} ({row[f'{name}_duplicates']})" for name in policies))
        for row in fresh
    ]
    return markdown_table(["load", "redundant", *policies], rows) if rows else ""


def soak_part(report: Report) -> str:
    """What a soak checked, and what each process took."""
    config, numbers = report.config, _numbers(report)
    counts = numbers["counts"]
    done = ("answers", "rearrangements", "experts moved", "disconnects", "hostile bodies", "knocks")
    rows = [
        (name, *(f"{found[key]['first']:g} -> {found[key]['last']:g}" for key in ("uss_mib", "descriptors", "threads")))
        for name, found in numbers["processes"].items()
    ]
    checks = [("passed" if check["passed"] else "FAILED", check["name"], check["found"]) for check in numbers["checks"]]
    return "\n\n".join(
        (
            f"Soak of {config['minutes']:g} minutes, `{report.label}`, commit `{report.commit}`: "
            + ", ".join(f"{counts[name]:,} {name}" for name in done)
            + ".",
            markdown_table(["", "check", "found"], checks),
            "The first and the last third after the warm-up, medians:",
            markdown_table(["process", "memory of its own (USS), MiB", "descriptors", "threads"], rows),
            _picture(report, "Memory, descriptors, threads and answers over time"),
        )
    )


def overload_part(report: Report) -> str:
    """More than a server can answer: what it measured and what was checked."""
    config, numbers = report.config, _numbers(report)
    rows = [
        (title, *(_seconds(numbers[name][percentile]) for percentile in ("p50", "p90", "p99")))
        for name, title in (
            ("ttft_ms", "first token of the admitted"),
            ("after_first_token_ms", "from there to the end"),
            ("e2e_ms", "whole answer of the admitted"),
            ("refused_after_ms", "refusal of the others"),
        )
    ]
    checks = [("passed" if check["passed"] else "FAILED", check["name"], check["found"]) for check in numbers["checks"]]
    return "\n\n".join(
        (
            f"Overload, `{report.label}`: {config['input_len']} tokens in, {config['output_len']} out, "
            f"dp={config['server']['parallel']['data_parallel_size']}, {config['times']:g} x "
            f"{numbers['capacity_requests_per_second']:g} requests/s for {config['seconds']:g} s, commit "
            f"`{report.commit}`: {numbers['offered']} requests, {numbers['admitted']} admitted; seconds.",
            markdown_table(["", "p50", "p90", "p99"], rows),
            markdown_table(["", "check", "found"], checks),
            _picture(report, "Each request by when it was due, and memory"),
        )
    )


def _seconds(milliseconds: float | None) -> str:
    return "-" if milliseconds is None else f"{milliseconds / 1000:.2f}"


def pods_part(report: Report) -> str:
    """What the others saw of one rank's death after the other."""
    config: Any = report.config
    numbers: Any = report.numbers
    rows = [
        (what, f"{numbers[name]['median']:.2f}", f"{max(numbers[name]['all']):.2f}")
        for what, name in (
            ("no other says that it is ready", "seconds_until_all_red"),
            ("the last stream that was under way has ended", "seconds_until_streams_under_way_ended"),
            ("the whole world is ready again", "seconds_until_all_green"),
        )
    ]
    ends = ", ".join(f"{count} {end}" for end, count in numbers["streams_under_way_at_a_kill"].items())
    first = f"{numbers['answered']} of {config['requests']} requests at once answered, then {config['kills']} kills"
    return (
        f"Pods, `{report.label}`, {config['ranks']} ranks, commit `{report.commit}`: {first} with "
        f"{config['streams']} streams under way at each ({ends}); seconds after a kill.\n\n"
        + markdown_table(["until", "median", "most"], rows)
    )


def pipeline_part(report: Report) -> str:
    """One flight beside as many as stages."""
    config, numbers = report.config, _numbers(report)
    rows = [
        (
            "one" if flights == "1" else f"{flights}, as many as stages",
            speed["median"],
            ", ".join(f"{share:.2f}" for share in numbers["busy_share_of_stages"][flights]),
        )
        for flights, speed in numbers["output_tokens_per_second"].items()
    ]
    ratio, quartiles = numbers["ratio"], " to ".join(f"{each:.2f}" for each in numbers["ratio"]["quartiles"])
    return (
        f"Pipeline stages, `{report.label}`, each on a core of its own: {config['num_requests']} requests of "
        f"{config['input_len']} tokens in, {config['output_len']} out, {config['turns']} turns of each, commit "
        f"`{report.commit}`. Ratio {ratio['median']:.2f} ({quartiles}); "
        f"{numbers['equal_answers']} of {numbers['answers']} answers equal.\n\n"
        + markdown_table(["flights", "output tokens/s", "share of the time that each stage computes"], rows)
    )


def all2all_part(report: Report) -> str:
    """A row per case, experts asked for evenly; then messages without a backend around them."""
    config, numbers = report.config, _numbers(report)
    names = list(next(iter(numbers.values()))["cases"][0]["us"])
    rows = [
        (ranks, case["rows"], f"{case['skew']:g}", *(_us_and_bytes(case, name) for name in names))
        for ranks, found in numbers.items()
        for case in found["cases"]
    ]
    plain = [
        (ranks, what, *(ways[way]["median"] for way in ways), f"{ways['gloo']['median'] / _shared(ways):.1f}")
        for ranks, found in numbers.items()
        for what, ways in found["plain_us"].items()
    ]
    header = ["ranks", "message", "gloo, us", "shared memory, us", "times as fast"]
    return (
        f"All-to-all backends of CPU ranks, `{report.label}`: one layer out and home without its experts, hidden size "
        f"{config['hidden']}, top-{config['top_k']} of {config['experts']}, {config['dtype']}, a thread per rank, "
        f"medians of {config['turns']} turns, load before {report.machine['load_before']}, commit `{report.commit}`. "
        "Microseconds, and in brackets the bytes that leave a rank, of those that must.\n\n"
        + markdown_table(["ranks", "rows", "skew", *names], rows)
        + "\n\n"
        + markdown_table(header, plain)
        + "\n\n"
        + _picture(report, "Time of an exchange over rows, and bytes moved")
    ).rstrip()


def _us_and_bytes(case: Mapping[str, Any], name: str) -> str:
    ratio = case["moved_bytes"][name] / max(case["needed_bytes"], 1)
    return f"{case['us'][name]['median']:,.0f} ({ratio:.1f})"


def _shared(ways: Mapping[str, Any]) -> float:
    return float(ways["shared memory"]["median"])


def _makes(limits: Mapping[str, float]) -> str:
    """The machine's arithmetic in the types that were tried."""
    types = [name.removesuffix("_gigaflops") for name in limits if name.endswith("_gigaflops")]
    return " and ".join(f"{limits[f'{name}_gigaflops']:.0f} GFLOP/s in {name}" for name in types)


def kernels_part(report: Report) -> str:
    """Compiled operations beside torch's, and beside what the machine can."""
    config, numbers = report.config, dict(report.numbers)
    limits: Any = numbers.pop("limits")
    rows = []
    for operation, found in numbers.items():
        assert isinstance(found, Mapping)
        for who, each in found.items():
            figures = (each["gigabytes_per_second"], each["gigaflops"], each["times_as_fast_as_torch"])
            rows.append((operation, who, f"{each['seconds'] * 1e6:,.0f}", *(f"{figure:.1f}" for figure in figures)))
    about = (
        f"Compiled operations in bfloat16, sizes of `{config['preset']}`, {config['threads']} threads, commit "
        f"`{report.commit}`. The machine reads {limits['gigabytes_per_second']:.1f} GB/s; a large product of torch's "
        f"makes {_makes(limits)}."
    )
    return f"{about}\n\n" + markdown_table(["operation", "by", "us", "GB/s", "GFLOP/s", "times torch"], rows)


def decode_limit_part(report: Report) -> str:
    """One request's decode beside what a plain sum reads."""
    config, numbers = report.config, report.numbers
    return (
        f"Decode with one request, `{config['model']}` in bfloat16, medians of {config['turns']} turns, load before "
        f"{report.machine['load_before']}, commit `{report.commit}`: a token needs "
        f"{_median(numbers, 'megabytes_of_a_token')} MB of weights and takes "
        f"{_median(numbers, 'milliseconds_of_a_token')} ms, {_median(numbers, 'gigabytes_per_second')} GB/s, "
        f"{_median(numbers, 'share')} of the {_median(numbers, 'gigabytes_per_second_of_a_sum')} GB/s that a sum over "
        "plain memory reads beside it."
    )


def halves_part(report: Report) -> str:
    """What cutting steps in halves gains, over how slow the wire is."""
    config = report.config
    about = (
        f"Steps in halves beside whole ones, `{config['model']}` in bfloat16 on {config['ranks']} engines, "
        f"{config['num_requests']} requests of {config['input_len']} tokens, {config['output_len']} out, medians of "
        f"{config['turns']} turns (least to most), load before {report.machine['load_before']}, commit "
        f"`{report.commit}`:"
    )
    rows = []
    for name, found in _numbers(report).items():
        gain = found["gain"]
        rows.append(
            (
                name.split()[1],
                found["seconds_whole"]["median"],
                found["seconds_in_halves"]["median"],
                f"{gain['median']} ({min(gain['all'])} to {max(gain['all'])})",
            )
        )
    table = markdown_table(["wire / computing", "whole, s", "in halves, s", "speed-up"], rows)
    return f"{about}\n\n{table}\n\n{_picture(report, 'Speed-up by halves over the time on the wire')}"


PARTS = {
    "halves": halves_part,
    "peers": peers_part,
    "kernels": kernels_part,
    "decode_limit": decode_limit_part,
    "all2all": all2all_part,
    "startup": startup_part,
    "pipeline": pipeline_part,
    "pods": pods_part,
    "serve": serve_part,
    "eplb_stall": stall_part,
    "eplb_topics": topics_part,
    "eplb_gain": gain_part,
    "eplb_balancedness": balancedness_part,
    "overload": overload_part,
    "soak": soak_part,
}


def _picture(report: Report, title: str, name: str = "") -> str:
    """A link to a picture beside the report; nothing where there is none."""
    folder, name = str(report.machine["name"]), name or f"{report.benchmark}-{report.label}"
    exists = (RESULTS / folder / f"{name}.svg").exists()
    return f"![{title}](../bench/results/{folder}/{name}.svg)" if exists else ""


def _numbers(report: Report) -> Any:
    return report.numbers


def _median(numbers: Mapping[str, Any], name: str) -> str:
    return str(numbers[name]["median"]) if name in numbers else ""


def _percentiles(values: Mapping[str, float | None]) -> str:
    return " / ".join("-" if value is None else f"{value:.1f}" for value in values.values())

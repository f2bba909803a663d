"""The decision and the sizing as one HTML page that needs nothing but itself: no script, no font,
no picture from elsewhere. Everything that comes from a file is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from ftplan import __version__
from ftplan.advice import TITLES, Advice
from ftplan.render.words import (
    GROUPS,
    VERDICTS,
    both_units,
    change_text,
    gb,
    gib,
    group_terms,
    headline,
    is_textbook,
    job_line,
    plain_value,
)
from ftplan.report import Report

__all__ = ["render"]

_CSS = """
:root{--ink:#1c2024;--soft:#5b6470;--line:#dfe3e8;--page:#fff;--card:#f7f8fa;--bar:#4263eb;
--fits:#2b8a3e;--tight:#b7791f;--over:#c92a2a;--unknown:#7048a8}
@media(prefers-color-scheme:dark){:root{--ink:#e6e8eb;--soft:#9aa4b0;--line:#32383f;--page:#15181b;
--card:#1d2126;--bar:#748ffc;--fits:#51cf66;--tight:#fcc419;--over:#ff6b6b;--unknown:#b197fc}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:58rem;margin:0 auto;padding:2.5rem 1.25rem 4rem}
h1{font-size:1.7rem;margin:0 0 .25rem}h2{font-size:1.3rem;margin:2.5rem 0 .5rem}
h3{font-size:1rem;margin:1.6rem 0 .4rem}p{margin:.4rem 0}
.soft{color:var(--soft)}.big{font-size:1.6rem;font-weight:650;margin:.6rem 0 .2rem}
section{border-top:1px solid var(--line);margin-top:2rem}
table{border-collapse:collapse;width:100%;font-size:.93rem}
th{color:var(--soft);font-weight:500;text-align:left}
td,th{padding:.28rem .8rem .28rem 0;vertical-align:top;border-bottom:1px solid var(--line)}
.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.sub td{border:0;padding-top:0;color:var(--soft);font-size:.86rem}
.bar{display:block;height:.7rem;background:var(--bar);border-radius:2px;min-width:1px}
.track{background:var(--card);border:1px solid var(--line);border-radius:3px;margin:.5rem 0}
.track .bar{height:1.1rem}
.v{display:inline-block;padding:.1rem .6rem;border-radius:1rem;color:#fff;font-weight:600;
font-size:.9rem}
.fits{background:var(--fits)}.tight{background:var(--tight)}.over{background:var(--over)}
.unknown{background:var(--unknown)}
ol.way{list-style:none;margin:.6rem 0;padding:0}
ol.way li{border-left:3px solid var(--line);padding:.15rem 0 .5rem .9rem;color:var(--soft)}
ol.way li.done,ol.way li.assumed{border-color:var(--fits)}
ol.way li.next{border-color:var(--bar);color:var(--ink);font-weight:600}
ol.way li.blocked{border-color:var(--over)}
code{font:.88em ui-monospace,Consolas,monospace;background:var(--card);padding:.05em .3em;
border-radius:3px}
ul{margin:.3rem 0;padding-left:1.2rem}
@media print{main{max-width:none}}
"""


def render(
    *, advice: Advice | None, reports: Sequence[tuple[str, Report]], title: str = "ftplan"
) -> str:
    """The whole page. ``reports`` are pairs of file name and report."""
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<title>{escape(title)}</title><style>{_CSS}</style></head><body><main>",
        f"<h1>{escape(title)}</h1>",
    ]
    if advice is not None:
        parts += _decision(advice)
    for file, report in reports:
        parts += _sizing(file, report)
    parts.append(f'<p class="soft">ftplan {escape(__version__)}</p></main></body></html>')
    return "\n".join(parts) + "\n"


def _codes(codes: Iterable[str]) -> str:
    return " ".join(f"<code>{escape(code)}</code>" for code in codes)


def _decision(advice: Advice) -> list[str]:
    step = advice.recommendation
    parts = ["<section><h2>The decision</h2>"]
    if advice.task:
        parts.append(f'<p class="soft">{escape(advice.task)}</p>')
    parts += [
        f'<p class="big">{escape(step.title)}</p>',
        f"<p>{escape(step.reason)} {_codes(step.rules)}</p>",
        f'<p class="soft">strength {escape(step.strength)}; stop when: '
        f"{escape(step.stop_when)}</p>",
    ]
    if advice.destination.step != step.step:
        parts.append(
            f"<p>It leads to: <b>{escape(TITLES[advice.destination.step])}</b>. "
            f"{escape(advice.destination.reason)} {_codes(advice.destination.rules)}</p>"
        )
    if advice.method is not None:
        parts.append(
            f"<p>How to train: <code>{advice.method.objective}</code> with "
            f"<code>{advice.method.kind}</code>. {escape(advice.method.why)}</p>"
        )
    parts.append('<h3>The way</h3><ol class="way">')
    parts += [
        f'<li class="{station.status}">{escape(station.title)}'
        + (f' <span class="soft">{escape(station.note)}</span>' if station.note else "")
        + "</li>"
        for station in advice.workflow
    ]
    parts.append("</ol>")
    shares = [share for share in advice.shares if share.kind is not None or share.class_]
    if shares:
        parts.append("<h3>What fails</h3><table><tr><th>class<th>kind<th class=n>count")
        parts.append("<th class=n>share<th></tr>")
        for share in shares:
            amount = share.share or 0.0
            between = (
                f" ({share.low:.0%} to {share.high:.0%})"
                if share.low is not None and share.high is not None
                else ""
            )
            parts.append(
                f"<tr><td>{escape(share.class_ or '')}<td>{escape(share.kind or 'all')}"
                f"<td class=n>{'' if share.count is None else share.count}"
                f"<td class=n>{'' if share.share is None else f'{share.share:.0%}'}{between}"
                f"<td width=25%>{_bar(amount)}</tr>"
            )
        parts.append("</table>")
    if advice.next_test is not None:
        test = advice.next_test
        parts.append(f"<h3>Find out first</h3><p><b>{escape(test.name)}</b>: {escape(test.why)} ")
        parts.append(f"{escape(test.how)}</p>")
    if advice.blocked:
        parts.append("<h3>Closed</h3><ul>")
        parts += [
            f"<li><b>{escape(TITLES[b.step])}</b>: {escape(b.reason)} {_codes([b.rule])}</li>"
            for b in advice.blocked
        ]
        parts.append("</ul>")
    parts.append("</section>")
    return parts


def _bar(share: float) -> str:
    return f'<span class="bar" style="width:{max(0.0, min(1.0, share)) * 100:.1f}%"></span>'


def _sizing(file: str, report: Report) -> list[str]:
    parts = [f"<section><h2>{escape(headline(report))}</h2>"]
    parts.append(f'<p class="soft"><code>{escape(file)}</code> {escape(job_line(report))}</p>')
    if report.verdict is not None:
        where = f" on {escape(report.gpu.name)} x {report.gpu.count}" if report.gpu else ""
        verdict = escape(VERDICTS[report.verdict])
        parts.append(f'<p><span class="v {report.verdict}">{verdict}</span>{where}</p>')
    parts += _numbers(report)
    parts += _terms(report)
    parts += _rest(report)
    parts.append("</section>")
    return parts


def _numbers(report: Report) -> list[str]:
    peak = report.device_bytes or report.allocated_bytes
    if peak is None or report.allocated_bytes is None:
        return []
    if is_textbook(report):
        total = escape(gb(peak.expected))
        return [f'<p class="big">{total}</p><p class="soft">the textbook\'s sum</p>']
    phase = f", in the {escape(report.peak_phase)} phase" if report.peak_phase else ""
    parts = [f'<p class="big">{escape(both_units(peak.expected))}</p>']
    parts.append(f"<p>per GPU at the worst moment{phase}</p>")
    if report.gpu is not None:
        share = peak.expected / max(1, report.gpu.usable_bytes)
        parts.append(f'<div class="track">{_bar(share)}</div>')
        parts.append(f'<p class="soft">{share:.0%} of {gib(report.gpu.usable_bytes)} GiB</p>')
    parts.append("<table><tr><th>GiB<th class=n>low<th class=n>expected<th class=n>high</tr>")
    for name, interval in (
        ("allocated", report.allocated_bytes),
        ("reserved", report.reserved_bytes),
        ("device (nvidia-smi)", report.device_bytes),
        ("host", report.host_bytes),
    ):
        if interval is not None:
            cells = "".join(
                f"<td class=n>{gib(n)}" for n in (interval.low, interval.expected, interval.high)
            )
            parts.append(f"<tr><td>{name}{cells}</tr>")
    return [*parts, "</table>"]


def _terms(report: Report) -> list[str]:
    total = report.total() or 1
    parts = ["<h3>What it is made of</h3><table><tr><th>term<th class=n>GiB<th class=n>GB<th></tr>"]
    for group, terms in group_terms(report.terms).items():
        alive = [term for term in terms if term.at_peak]
        amount = sum(term.bytes for term in alive)
        if not alive:
            continue
        parts.append(
            f"<tr><td>{escape(GROUPS.get(group, group))}<td class=n>{gib(amount)}"
            f"<td class=n>{escape(gb(amount))}<td width=35%>{_bar(amount / total)}</tr>"
        )
        parts += [
            f'<tr class="sub"><td>&nbsp;&nbsp;{escape(term.name)}<td class=n>{gib(term.bytes)}'
            f"<td><td>{escape(term.formula)}</tr>"
            for term in sorted(alive, key=lambda t: -t.bytes)
            if term.bytes * 1000 >= total
        ]
    parts.append("</table>")
    if len(report.phases) > 1:
        most = max(phase.peak_bytes for phase in report.phases) or 1
        parts.append("<h3>Peak of each phase</h3><table>")
        parts += [
            f"<tr><td>{escape(p.name)}<td class=n>{gib(p.peak_bytes)} GiB"
            f"<td width=60%>{_bar(p.peak_bytes / most)}</tr>"
            for p in report.phases
        ]
        parts.append("</table>")
    return parts


def _rest(report: Report) -> list[str]:
    parts: list[str] = []
    if report.findings:
        parts.append("<h3>Findings</h3><ul>")
        for f in report.findings:
            where = f" <code>{escape(str(f.location))}</code>" if f.location else ""
            hint = f' <span class="soft">{escape(f.help)}</span>' if f.help else ""
            said = escape(f.message)
            parts.append(f"<li><b>{f.severity} {escape(f.code)}</b>{where} {said}{hint}</li>")
        parts.append("</ul>")
    if report.remedies:
        parts.append("<h3>What would help, in order</h3><table><tr><th>change<th class=n>saves GiB")
        parts.append("<th>alone<th>then<th>cost</tr>")
        parts += [
            f"<tr><td><code>{escape(change_text(r.in_file or r.change))}</code>"
            f"<td class=n>{gib(max(0, r.saves_bytes))}<td>{r.verdict_alone or ''}"
            f"<td>{r.verdict or ''}"
            f"<td>{escape(r.costs)}</tr>"
            for r in report.remedies
        ]
        parts.append("</table>")
    if report.assumptions:
        parts.append("<h3>Assumed, because it was not given</h3><table>")
        parts += [
            f"<tr><td><code>{escape(a.key)}</code><td><code>{escape(plain_value(a.value))}</code>"
            f'<td class="soft">{escape(a.source)}</tr>'
            for a in report.assumptions
        ]
        parts.append("</table>")
    return parts

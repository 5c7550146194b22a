"""The HTML of a report: style, script and the parts around the charts. Every text that comes from a run is escaped."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import time
from typing import Any

from runner.tracking.charts import format_number
from runner.tracking.pictures import by_turn

__all__ = [
    "alarms",
    "details",
    "document",
    "events",
    "facts",
    "format_number",
    "grid",
    "header",
    "preformatted",
    "samples",
    "table",
    "tiles",
]

NEAR, FAR = 0.01, 0.1  # nats between the logprobs of engine and trainer

STYLE = """
:root{color-scheme:light dark;--bg:#f6f7f9;--card:#fff;--text:#1b1f24;--dim:#667080;--line:#e3e6ea;--zero:#b4bac2;
--s0:#2563c9;--s1:#d8730a;--s2:#0d8f7c;--s3:#8a4fd3;--s4:#cb3a52;--s5:#7c8a12;--s6:#0e86b8;--s7:#98a0ab;
--good:#12805c;--bad:#c4314b;--warn:#a86a00}
@media(prefers-color-scheme:dark){:root{--bg:#13161a;--card:#1b1f25;--text:#e6e9ed;--dim:#98a2b0;--line:#2c323a;--zero:#57606c;
--s0:#6ea4ff;--s1:#f7a04b;--s2:#41c7b0;--s3:#b98cf5;--s4:#f4788c;--s5:#b9c74a;--s6:#56c2ee;--s7:#727c89;
--good:#4cc79a;--bad:#f4788c;--warn:#e5b04a}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--text);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1360px;margin:0 auto;padding:28px 20px 48px}
h1{font-size:24px;line-height:1.25;margin:0;overflow-wrap:anywhere}
h2{font-size:16px;margin:28px 0 10px}
.top{display:flex;gap:12px;align-items:center;flex-wrap:wrap}
.pill{font-size:13px;font-weight:600;padding:2px 10px;border-radius:99px;border:1px solid currentColor;color:var(--dim)}
.completed{color:var(--good)}.failed,.killed{color:var(--bad)}.stopped,.interrupted{color:var(--warn)}.running{color:var(--s0)}
.chips{display:flex;flex-wrap:wrap;gap:6px;margin:12px 0 4px}
.chips span{font:12.5px ui-monospace,Menlo,Consolas,monospace;background:var(--card);
border:1px solid var(--line);border-radius:6px;padding:2px 8px}
.facts{color:var(--dim);font-size:13.5px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:20px 0 0}
.tile,.card,details,.panel{background:var(--card);border:1px solid var(--line);border-radius:10px}
.tile{padding:12px 16px}.tile b{display:block;font-size:25px;line-height:1.25;font-variant-numeric:tabular-nums}
.tile span,.tile small{color:var(--dim);font-size:13px;display:block}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(340px,100%),1fr));gap:14px;margin:16px 0 0}
figure{margin:0}.card{padding:12px 14px 10px;min-width:0}
figcaption{margin-bottom:6px;line-height:1.35}
figcaption b{display:block;overflow-wrap:anywhere}
figcaption small,.empty{color:var(--dim);font-size:12.5px}
svg.chart{width:100%;height:auto;display:block;touch-action:pan-y}
svg text{font:12px system-ui,sans-serif;fill:var(--dim)}
svg .grid{stroke:var(--line)}svg .zero{stroke:var(--zero)}
svg .line{fill:none;stroke-width:2;stroke-linejoin:round}svg .pale{fill:none;stroke-width:1.2;opacity:.38}svg .many{opacity:.2}
svg .band{opacity:.18}svg .cross{stroke:var(--dim);stroke-dasharray:3 3;pointer-events:none}
.legend{display:flex;flex-wrap:wrap;gap:3px 14px;font-size:12.5px;color:var(--dim);margin-top:2px}
.key i{display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:6px}
#tip{position:fixed;display:none;z-index:9;pointer-events:none;background:var(--card);border-radius:8px;
border:1px solid var(--zero);padding:6px 10px;font-size:12.5px;
box-shadow:0 3px 14px #0003;font-variant-numeric:tabular-nums;max-width:80vw}
#tip td{padding:0 0 0 10px;text-align:right}#tip td:first-child{padding:0;text-align:left}
#tip i{display:inline-block;width:9px;height:9px;border-radius:3px;margin-right:6px}
.panel{padding:4px 16px;margin-top:14px}
.event{display:grid;grid-template-columns:76px 150px 1fr;gap:10px;padding:8px 0;border-top:1px solid var(--line);font-size:14px}
.event:first-child{border:0}.event span{color:var(--dim)}.event b{overflow-wrap:anywhere}.event .warn{color:var(--warn)}
.event p{margin:0;white-space:pre-line;overflow-wrap:anywhere}
details{margin-top:14px;padding:0 16px}summary{cursor:pointer;font-weight:600;padding:12px 0}
details[open]{padding-bottom:16px}
pre{margin:0;overflow:auto;font:12.5px/1.5 ui-monospace,Menlo,Consolas,monospace;max-height:70vh}
.sample{border-top:1px solid var(--line);padding:10px 0}.sample:first-child{border:0}
.sample header{color:var(--dim);font-size:13px;margin-bottom:4px}
.token{border-radius:3px}.token.near{background:color-mix(in srgb,var(--warn) 22%,transparent)}
.token.far{background:color-mix(in srgb,var(--bad) 34%,transparent)}.token.other{color:var(--dim);font-style:italic}
.token:focus{outline:2px solid var(--s0)}
.timeline{margin-top:14px}.timeline .scroll{margin:0}.timeline svg{min-width:640px;width:100%}
.alarm{border-color:var(--bad)}.steps a,.back{color:var(--s0)}
.steps{display:flex;flex-wrap:wrap;gap:6px;margin:12px 0;max-height:9em;overflow:auto}
#live{margin-top:8px;font-size:13px;color:var(--dim)}
.sample .by{color:var(--dim);font-size:12px}.sample .note{color:var(--dim);font-size:12px}
.sample img{display:block;min-width:96px;max-width:256px;margin:6px 0;image-rendering:pixelated;border-radius:4px}
.sample pre{white-space:pre-wrap;overflow-wrap:anywhere}.sample .prompt{color:var(--dim)}
.verdict{max-width:80ch;margin:6px 0}.scroll{overflow-x:auto;margin-top:18px}
table.results{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums}
.results th,.results td{padding:8px 12px;text-align:right;border-top:1px solid var(--line);white-space:nowrap}
.results th{color:var(--dim);font-weight:600;border:0}.results th:first-child,.results td:first-child{text-align:left}
@media(max-width:640px){main{padding:18px 12px 32px}h1{font-size:20px}
.tiles{grid-template-columns:1fr 1fr;gap:8px}.tile b{font-size:21px}
.event{grid-template-columns:auto 1fr}.event p{grid-column:1/-1}}
svg.chart:focus-visible,summary:focus-visible{outline:2px solid var(--s0);outline-offset:2px}
@media print{:root{--bg:#fff;--card:#fff;--text:#000;--dim:#444;--line:#ccc;color-scheme:light}main{max-width:none;padding:0}
details,#live,.steps,.back,#tip{display:none!important}.card,.tile,.event,.sample{break-inside:avoid}h2{break-after:avoid}
.grid{grid-template-columns:1fr 1fr}.scroll{overflow:visible}.results{font-size:11px!important}
.results th,.results td{white-space:normal;overflow-wrap:anywhere;padding:3px 5px}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""

SCRIPT = """
const tip=document.getElementById('tip'),fmt=v=>{if(v===null)return '–';const a=Math.abs(v);
if(v===0)return '0';return a>=1e5||a<1e-4?v.toExponential(2):String(+v.toPrecision(4))};
const known=new WeakMap();let over=null;
const hide=()=>{tip.style.display='none';if(over){const c=over.querySelector('.cross');
c.setAttribute('x1',-9);c.setAttribute('x2',-9)}over=null};
const data=svg=>{let d=known.get(svg);if(!d){d=JSON.parse(svg.dataset.chart);
d.xs=[...new Set(d.series.flatMap(s=>s.points.map(p=>p[0])))].sort((a,b)=>a-b);known.set(svg,d)}return d};
function show(svg,x,clientX,clientY){const d=data(svg),cross=svg.querySelector('.cross');over=svg;
const at=d.left+(x-d.low)/(d.high-d.low)*(d.right-d.left);
cross.setAttribute('x1',at);cross.setAttribute('x2',at);svg.dataset.at=x;tip.replaceChildren();
const head=document.createElement('div');head.textContent='step '+fmt(x);head.style.color='var(--dim)';tip.append(head);
const table=document.createElement('table');for(const s of d.series){const p=s.points.find(p=>p[0]===x);if(!p)continue;
const row=table.insertRow(),name=row.insertCell(),dot=document.createElement('i');dot.style.background='var(--s'+s.color+')';
name.append(dot,s.label);row.insertCell().textContent=fmt(p[1])}tip.append(table);tip.style.display='block';
const box=svg.getBoundingClientRect();if(clientX===null){clientX=box.left+at/d.width*box.width;clientY=box.top+box.height/2}
const w=tip.offsetWidth,left=clientX+16+w>innerWidth?clientX-w-16:clientX+16;
tip.style.left=Math.max(4,left)+'px';tip.style.top=Math.max(4,Math.min(clientY+14,innerHeight-tip.offsetHeight-4))+'px'}
const chart=e=>e.target.closest?e.target.closest('svg.chart'):null;
for(const kind of ['pointermove','pointerdown'])document.addEventListener(kind,e=>{const svg=chart(e);if(svg!==over)hide();
if(!svg)return;const d=data(svg),box=svg.getBoundingClientRect();if(!d.xs.length)return;
const px=(e.clientX-box.left)/box.width*d.width,want=d.low+(px-d.left)/(d.right-d.left)*(d.high-d.low);
show(svg,d.xs.reduce((a,b)=>Math.abs(b-want)<Math.abs(a-want)?b:a),e.clientX,e.clientY)});
document.addEventListener('focusout',hide);
document.addEventListener('keydown',e=>{const svg=chart(e);if(!svg)return;if(e.key==='Escape')return hide();
const d=data(svg),last=d.xs.length-1,now=over===svg?d.xs.indexOf(+svg.dataset.at):-1;
const to={ArrowLeft:now<0?last:Math.max(0,now-1),ArrowRight:now<0?0:Math.min(last,now+1),Home:0,End:last}[e.key];
if(to===undefined||last<0)return;e.preventDefault();if(over!==svg)hide();show(svg,d.xs[to],null,null)});
"""

LIVE_SCRIPT = """
const main=document.querySelector('main'),say=t=>{const e=document.getElementById('live');if(e)e.textContent=t};
let busy=false,again=false;
async function draw(){if(busy){again=true;return}busy=true;try{
const r=await fetch('body',{cache:'no-store'});if(!r.ok)throw 0;
const text=await r.text(),open=new Set([...main.querySelectorAll('details[open]>summary')].map(s=>s.textContent));
main.innerHTML=text;hide();
for(const s of main.querySelectorAll('details>summary'))if(open.has(s.textContent))s.parentNode.open=true;
}catch{say('not reached; trying again')}busy=false;if(again){again=false;draw()}}
const source=new EventSource('events');source.addEventListener('drawn',draw);
source.onerror=()=>say('no longer watched: `runner watch` has ended or is not reached');
"""


def policy(*, live: bool = False) -> str:
    """The page's Content-Security-Policy: of scripts ours alone, known by its hash. No connection at all, but to the server that
    a `live` page came from."""
    digest = base64.b64encode(hashlib.sha256(_script(live).encode()).digest()).decode()
    rules = ["default-src 'none'", "base-uri 'none'", "form-action 'none'", "img-src data:", "style-src 'unsafe-inline'"]
    return "; ".join([*rules, f"script-src 'sha256-{digest}'", *(["connect-src 'self'"] if live else [])])


def _script(live: bool) -> str:
    return SCRIPT + (LIVE_SCRIPT if live else "")


def document(title: str, body: str, *, live: bool = False) -> str:
    """The whole page. The policy forbids any connection, so the file shows the same everywhere and forever; a `live` page asks
    its server for what is new."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy(live=live)}">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>"
        f'<body><main>{body}</main><div id="tip"></div><script>{_script(live)}</script></body></html>\n'
    )


def header(title: str, state: str, chips: list[str], lines: list[str]) -> str:
    pill = f'<span class="pill {html.escape(state)}">{html.escape(state)}</span>' if state else ""
    shown = "".join(f"<span>{html.escape(chip)}</span>" for chip in chips)
    text = " · ".join(html.escape(line) for line in lines)
    top = f'<div class="top"><h1>{html.escape(title)}</h1>{pill}</div>'
    return f'{top}<div class="chips">{shown}</div><div class="facts">{text}</div>'


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.1f} min" if minutes < 120 else f"{hours:.1f} h"


def facts(status: dict[str, Any], config: dict[str, Any], steps: int) -> list[str]:
    """The line below the title: steps, time, seed, message."""
    lines = [f"{steps} of {config['steps']} steps" if "steps" in config else f"{steps} steps"]
    if status:
        lines.append(f"started {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime(status['started']))}")
        lines.append(f"ran {duration(status['active_seconds'])}")
        if status["attempt"] > 1:
            lines.append(f"{status['attempt']} attempts")
    if "seed" in config:
        lines.append(f"seed {config['seed']}")
    if status.get("message") and status["message"] != status["state"]:
        lines.append(status["message"])
    return lines


def tiles(boxes: list[tuple[str, str, str]]) -> str:
    inner = "".join(
        f'<div class="tile"><span>{html.escape(title)}</span><b>{html.escape(number)}</b><small>{html.escape(note)}</small></div>'
        for title, number, note in boxes
    )
    return f'<div class="tiles">{inner}</div>' if boxes else ""


def grid(cards: list[str]) -> str:
    return f'<div class="grid">{"".join(cards)}</div>' if cards else ""


def event_class(kind: str) -> str:
    """What a reader has to look at stands out from what was to be expected."""
    return ' class="warn"' if kind.startswith("watch") or kind in ("warning", "sync_failed", "skipped_step") else ""


def events(rows: list[dict[str, Any]]) -> str:
    return f'<div class="panel">{"".join(_event(row, event_class(row["kind"])) for row in rows)}</div>' if rows else ""


def _event(row: dict[str, Any], kind_class: str) -> str:
    return (
        f'<div class="event"><span>step {row["step"] + 1}</span><b{kind_class}>{html.escape(row["kind"])}</b>'
        f"<p>{html.escape(row['message'])}</p></div>"
    )


def alarms(rows: list[dict[str, Any]]) -> str:
    """What a rule of `watch` said: what broke, the likely cause, what to try."""
    inner = "".join(_event(row, ' class="warn"') for row in rows)
    return f'<h2>Alarms</h2><div class="panel alarm">{inner}</div>' if rows else ""


def links(title: str, rows: list[tuple[str, str]]) -> str:
    """(address below the page's own, text)."""
    inner = "".join(f'<a href="{html.escape(address)}">{html.escape(text)}</a>' for address, text in rows)
    return f'<h2>{html.escape(title)}</h2><nav class="steps">{inner}</nav>' if rows else ""


def samples(rows: list[tuple[int, dict[str, Any]]], *, every_token: bool = False) -> str:
    """Texts of a few samples; keys beside prompt, response and turns go into the line above them. `every_token`: a part to open
    below each, with the logprobs of engine and trainer."""
    parts = []
    for number, (step, row) in enumerate(rows):
        rest = {
            key: value for key, value in row.items() if key not in ("prompt", "response", "turns", "worst", "tokens", "images")
        }
        facts_line = "  ".join(f"{key} {value if isinstance(value, str) else json.dumps(value)}" for key, value in rest.items())
        before, of_turns = by_turn(row, [uri for uri in row.get("images") or [] if isinstance(uri, str)])
        body = turns(row["turns"], of_turns) if row.get("turns") else html.escape(str(row.get("response", "")))
        below = tokens(row.get("tokens") or [], f"step {step + 1}, {number}") if every_token else ""
        parts.append(
            f'<div class="sample"><header>step {step + 1}  ·  {html.escape(facts_line)}</header>'
            f'<pre><span class="prompt">{html.escape(str(row.get("prompt", "")))}</span>{images(before)}'
            f"{body}</pre>{worst(row.get('worst') or [])}{below}</div>"
        )
    return f'<h2>Samples</h2><div class="panel">{"".join(parts)}</div>' if parts else ""


def images(uris: list[str]) -> str:
    return "".join(f'<img alt="image" src="{html.escape(uri)}">' for uri in uris)


def turns(rows: list[dict[str, Any]], shown: list[list[str]]) -> str:
    """A conversation: the model's words, what the environment answered and showed, and what is noted beside a turn."""
    lines = []
    for turn, uris in zip(rows, shown, strict=True):
        notes = turn.get("notes") or {}
        if "advantage" in turn:
            notes = {"advantage": turn["advantage"], **notes}
        note = f'<span class="note">  {html.escape(json.dumps(notes))}</span>' if notes else ""
        lines.append(
            f'\n<span class="by">{html.escape(str(turn.get("by", "")))}</span> {html.escape(str(turn.get("text", "")))}{note}'
            + images(uris)
        )
    return "".join(lines)


def tokens(rows: list[list[Any]], title: str) -> str:
    """A sample token by token: marked where engine and trainer are apart, grey what an environment said."""
    cells = []
    for position, (text, *numbers) in enumerate(rows):
        kind, said = "other", f"{position}: of the environment"
        if len(numbers) == 2:
            apart = abs(numbers[0] - numbers[1])
            kind = "far" if apart > FAR else "near" if apart > NEAR else ""
            said = f"{position}: engine {numbers[0]:.4f}, trainer {numbers[1]:.4f}"
        cells.append(f'<span class="token {kind}" tabindex="0" title="{html.escape(said)}">{html.escape(str(text))}</span>')
    note = f"logprobs of engine and trainer: marked where they are apart by more than {NEAR} or {FAR}"
    inner = f'<div class="note">{note}</div><pre>{"".join(cells)}</pre>'
    return details(f"token by token ({title})", inner) if rows else ""


def worst(rows: list[dict[str, Any]]) -> str:
    """The tokens on which engine and trainer disagree most."""
    cells = (f"{row['token']!r} at {row['position']}: {row['engine']:.3f} / {row['trainer']:.3f}" for row in rows)
    line = "  ·  ".join(cells)
    return f'<div class="note">logprobs apart most (engine / trainer): {html.escape(line)}</div>' if rows else ""


def text(title: str, sentences: str) -> str:
    return f'<h2>{html.escape(title)}</h2><p class="verdict">{html.escape(sentences)}</p>'


def details(title: str, body: str) -> str:
    return f"<details><summary>{html.escape(title)}</summary>{body}</details>"


def preformatted(text: str) -> str:
    return f"<pre>{html.escape(text)}</pre>"


def table(columns: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll panel"><table class="results"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'

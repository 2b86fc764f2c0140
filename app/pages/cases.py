"""Case studies: what papers claim, what was measured here, and the verdicts."""

from __future__ import annotations

import base64
import json
from collections.abc import Hashable, Sequence
from typing import Any

import dash_ag_grid as dag
import dash_mantine_components as dmc
import plotly.graph_objects as go
import plotly.io
from dash import MATCH, Dash, Input, Output, State, ctx, dcc, html, no_update
from dash.development.base_component import Component

from app.figures.common import number
from app.frames import content_frame
from app.markdown import literal_brackets
from app.page import Page
from app.services import Scene, Services
from app.studies import MOST_SEEDS, OpenStudy, open_study, overview, start_study
from app.theme import template, theme_called
from app.view_state import ViewState
from case_studies.harness.claims import EVIDENCE, Study
from case_studies.harness.discovery import study_problems
from case_studies.harness.errors import StudyError
from case_studies.harness.export import as_csv, as_python, as_record
from case_studies.harness.results import KIND, NOT_REPRODUCED, NOT_RUN, REPRODUCED, ClaimResult, StudyResult, ours
from case_studies.harness.shipped import code_changed, open_run
from workbench.lab.jobs import JobError
from workbench.lab.run_folder import Run
from workbench.lab.runs import RunError

LOOK = {REPRODUCED: "chip-good", NOT_REPRODUCED: "chip-bad", NOT_RUN: ""}
NEVER = "never run here"
COUNT = {"type": "rightAligned", "width": 118}
STUDY_COLUMNS = [
    {
        "field": "title",
        "headerName": "Study",
        "minWidth": 240,
        "flex": 4,
        "wrapText": True,
        "autoHeight": True,
        "cellClass": "cell-prose cell-link",
    },
    {"field": "claims", "headerName": "Claims", **COUNT, "width": 88},
    {"field": "reproduced", "headerName": "Reproduced", **COUNT, "cellClassRules": {"cell-good": "params.value > 0"}},
    {
        "field": "failed",
        "headerName": "Not reproduced",
        **COUNT,
        "width": 142,
        "cellClassRules": {"cell-bad": "params.value > 0"},
    },
    {"field": "open", "headerName": "Not run here", **COUNT, "width": 124},
    {"field": "last", "headerName": "Last run (UTC)", "minWidth": 215, "flex": 2},
    {"field": "paper", "headerName": "Paper", "minWidth": 150, "flex": 1, "cellClass": "cell-mono"},
]
VERDICT_RULES = {
    "cell-good": f"params.value == '{REPRODUCED}'",
    "cell-bad": f"params.value == '{NOT_REPRODUCED}'",
}
WRAPPED = {"wrapText": True, "autoHeight": True, "cellClass": "cell-prose"}
CLAIM_COLUMNS = [
    {
        "field": "sentence",
        "headerName": "Claim",
        "minWidth": 190,
        "flex": 5,
        **WRAPPED,
        "cellClass": "cell-prose cell-link",
    },
    {"field": "verdict", "headerName": "Verdict", "width": 132, "cellClassRules": VERDICT_RULES},
    {"field": "published", "headerName": "Published", "width": 116, **WRAPPED},
    {"field": "ours", "headerName": "Ours", "minWidth": 200, "flex": 3, **WRAPPED},
    {"field": "n", "headerName": "n", "width": 60, "type": "rightAligned"},
]
GRID = {"suppressNoRowsOverlay": True, "animateRows": False, "domLayout": "autoHeight", "headerHeight": 38}


def structure(scene: Scene) -> Hashable:
    return "cases", scene.view.study, scene.view.result


def layout(services: Services, scene: Scene) -> Sequence[Component]:
    if not scene.view.study and not scene.view.result:
        return _index(services)
    opened = open_study(services.store, scene.view.study, scene.view.result)
    back = html.A("← All studies", href=scene.view.change(study="", result="").to_url(), className="in-app back-link")
    if opened.study is None and opened.result is None:
        return [
            back,
            html.Div([html.Strong("This study is not here"), html.Span(opened.problem)], className="panel-message"),
        ]
    return [back, *_banner(opened), html.Div(_study_page(opened, scene.view), className="grid")]


# ---- all studies -----------------------------------------------------------------------------------------------------


def study_rows(services: Services) -> list[dict[str, Any]]:
    """One row per study, with the verdicts of its most telling run."""
    rows = []
    for study, result in overview(services.store):
        counts: dict[str, int | None] = {"reproduced": None, "failed": None, "open": None}
        if result is not None:
            found = (result.count(REPRODUCED), result.count(NOT_REPRODUCED), result.count(NOT_RUN))
            counts = dict(zip(counts, found, strict=True))
        last = NEVER
        if result is not None:
            last = (
                f"{result.tier} · {result.created[: 10 if result.shipped else 16].replace('T', ' ')}{_shipped(result)}"
            )
        rows.append(
            {
                "id": study.name,
                "title": study.title,
                "claims": len(study.claims),
                "paper": study.paper,
                "last": last,
                **counts,
            }
        )
    return rows


def _shipped(result: StudyResult) -> str:
    return " · shipped" if result.shipped else ""


def _index(services: Services) -> list[Component]:
    grid = dag.AgGrid(
        id="cases-grid", rowData=study_rows(services), columnDefs=STUDY_COLUMNS, className="runs-grid case-grid",
        getRowId="params.data.id", defaultColDef={"sortable": True, "resizable": True}, dashGridOptions=GRID,
    )  # fmt: skip
    words = "A study measures what a paper claims and applies a rule that was written down before. A claim that fails is a finding."
    frames = [content_frame("cases", "All studies", words, grid)]
    problems = study_problems()
    if problems:
        lines = [
            html.Div([html.Span(each.folder, className="mono"), html.Span(each.reason)], className="problem")
            for each in problems
        ]
        frames.append(content_frame("case-problems", "Folders that are not readable studies", "", lines))
    return [html.Div(frames, className="grid")]


# ---- one study -------------------------------------------------------------------------------------------------------


def _banner(opened: OpenStudy) -> list[Component]:
    if not opened.problem:
        return []
    return [
        html.Div([html.Strong("Not everything is here"), html.Span(opened.problem)], className="banner", role="alert")
    ]


def _study_page(opened: OpenStudy, view: ViewState) -> list[Component]:
    study, result, run = opened.study, opened.result, opened.run
    left: list[Component] = [_claims(study, result)]
    if result is not None and run is not None:
        left += [_figure_frame(run, name) for name in run.figures()]
    right: list[Component] = []
    if study is not None:
        right.append(_form(study))
    if result is not None and run is not None:
        right.append(_facts(result, study is not None and code_changed(run, study)))
    if opened.others:
        right.append(_history(opened, view))
    if study is not None:
        readme = dcc.Markdown(literal_brackets(study.readme), className="card-text", link_target="_blank")
        left.append(content_frame("case-readme", "About this study", "", readme))
    chosen = dcc.Store(id="case-result", data=result.run if result else "")
    return [html.Div(left, className="column span-8"), html.Div([*right, chosen], className="column span-4")]


def claim_rows(study: Study | None, result: StudyResult | None) -> list[dict[str, Any]]:
    """One row per claim: of the result, or of the study when there is none."""
    if result is not None:
        return [
            {"id": each.id, "sentence": each.sentence, "verdict": each.verdict, "published": _published(each.published),
             "ours": ours(each), "n": each.n or "–"}
            for each in result.claims
        ]  # fmt: skip
    claims = study.claims if study is not None else ()
    return [
        {"id": each.id, "sentence": each.sentence, "verdict": NEVER, "published": _published(each.published), "ours": "–",
         "n": "–"}
        for each in claims
    ]  # fmt: skip


def _published(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.6g}"


def _claims(study: Study | None, result: StudyResult | None) -> Component:
    grid = dag.AgGrid(
        id="claims-grid", rowData=claim_rows(study, result), columnDefs=CLAIM_COLUMNS, className="runs-grid case-grid",
        getRowId="params.data.id", defaultColDef={"sortable": True, "resizable": True}, dashGridOptions=GRID,
    )  # fmt: skip
    title = result.title if result is not None else study.title if study is not None else ""
    words = study.summary if study is not None else ""
    chips: list[Component] = []
    if result is not None:
        chips = [
            html.Span(f"{result.count(verdict)} {verdict}", className=f"chip {look}")
            for verdict, look in LOOK.items() if result.count(verdict)
        ]  # fmt: skip
    tools = [
        dmc.Button(name, id=f"case-export-{kind}", size="xs", variant="light", n_clicks=0, disabled=result is None)
        for kind, name in (("json", "JSON"), ("csv", "CSV"), ("python", "Python"))
    ]
    head = html.Div([html.Div(chips, className="chip-row", style={"flex": 1}), *tools], className="form-row runs-tools")
    hint = html.P("Click a claim for the rule, the source, and the value of every seed.", className="panel-words")
    return content_frame("claims", title, words, [head, grid, hint, dcc.Download(id="case-download")])


def _figure_frame(run: Run, name: str) -> Component:
    """A figure of the run: Plotly figures are drawn (and coloured) by the browser, pictures are shown as they are."""
    title = name.rpartition(".")[0].replace("-", " ").replace("_", " ").capitalize()
    identity = {"type": "case-figure", "name": name}
    if name.endswith(".json"):
        try:
            title = _figure(run, name, "light")[1] or title
        except ValueError:
            return content_frame(
                f"case-{name}", title, "", html.P("This figure cannot be read.", className="form-hint")
            )
        graph = dcc.Graph(id=identity, config={"displayModeBar": False, "responsive": True}, style={"height": "360px"})
        return content_frame(f"case-{name.rpartition('.')[0]}", title, "", graph, padded=False)
    if name.endswith((".png", ".svg")):
        kind = "png" if name.endswith(".png") else "svg+xml"
        source = f"data:image/{kind};base64,{base64.b64encode(run.figure(name)).decode()}"
        return content_frame(
            f"case-{name.rpartition('.')[0]}", title, "", html.Img(src=source, alt=title, className="case-picture")
        )
    text = run.figure(name).decode("utf-8", "replace")[:20_000]
    return content_frame(f"case-{name.rpartition('.')[0]}", title, "", html.Pre(text, className="mono case-text"))


def _figure(run: Run, name: str, scheme: str) -> tuple[go.Figure, str]:
    """(figure in the colours of the scheme, its title): the title stands in the frame. ValueError when it is no figure."""
    figure = plotly.io.from_json(run.figure(name).decode("utf-8"), skip_invalid=True)
    title = (figure.layout.title.text or "") if figure.layout.title else ""
    figure.update_layout(template=template(scheme), title=None, autosize=True, width=None, height=None)
    return figure, title


def _form(study: Study) -> Component:
    tiers = [{"value": tier.name, "label": tier.name} for tier in study.tiers.values()]
    first = "smoke" if "smoke" in study.tiers else tiers[0]["value"]
    body = html.Div(
        [
            dcc.Store(id="case-name", data=study.name),
            dmc.SegmentedControl(id="case-tier", data=tiers, value=first, fullWidth=True, **{"aria-label": "How much"}),
            html.Div(id="case-about", className="form-hint"),
            dmc.NumberInput(id="case-seeds", label="Seeds", min=1, max=MOST_SEEDS, allowDecimal=False,
                            placeholder="as many as the study says"),
            html.Div(dmc.Button("Start", id="case-start", n_clicks=0), className="form-row"),
            html.Div(id="case-message", className="form-message", role="alert"),
        ],
        className="form-stack",
    )  # fmt: skip
    return content_frame(
        "case-form", "Measure it here", "Progress is shown below and can be cancelled; finished seeds are kept.", body
    )


def tier_words(study: Study, name: str) -> str:
    """About how long a tier takes, with how many seeds, and what the study says of it."""
    tier = study.tier(name)
    parts = [f"{tier.seeds} seed{'' if tier.seeds == 1 else 's'}"]
    if tier.minutes is not None:
        length = f"{round(60 * tier.minutes)} s" if tier.minutes < 1 else f"{number(tier.minutes)} min"
        parts.append(f"about {length} on one core")
    decided = sum(list(study.tiers).index(claim.tier) <= list(study.tiers).index(name) for claim in study.claims)
    parts.append(f"decides {decided} of {len(study.claims)} claims")
    return ", ".join(parts) + (f". {tier.note[:1].upper()}{tier.note[1:]}" if tier.note else "") + "."


def _facts(result: StudyResult, outdated: bool) -> Component:
    facts = [
        ("tier", result.tier), ("seeds", ", ".join(map(str, result.seeds[:12])) + (" …" if len(result.seeds) > 12 else "")),
        ("computed in", f"{number(result.seconds)} s"), ("made (UTC)", result.created[:16].replace("T", " ")),
        ("code", result.code_version), ("machine", result.machine), ("run", result.run),
        ("from", "shipped with the workbench" if result.shipped else ""),
        ("note", "The study's code has changed since." if outdated else ""),
    ]  # fmt: skip
    shown = [html.Div([html.Dt(name), html.Dd(text)]) for name, text in facts if text]
    return content_frame("case-facts", "This result", "", html.Dl(shown, className="card-facts case-facts"))


def _history(opened: OpenStudy, view: ViewState) -> Component:
    shown = opened.result.run if opened.result else ""
    lines = []
    for each in opened.others[:20]:
        words = f"{each.created[:16].replace('T', ' ')} · {each.tier}{_shipped(each)}"
        link = html.A(words, href=view.change(study=each.study, result=each.run).to_url(), className="in-app",
                      **{"aria-current": "true" if each.run == shown else "false"})  # fmt: skip
        lines.append(html.Li([link, html.Div(each.words, className="form-hint")]))
    return content_frame("case-history", "Results", "Newest first.", html.Ul(lines, className="case-history"))


def claim_details(study: Study | None, result: StudyResult | None, claim_id: str) -> list[Component]:
    """Everything about one claim, for the sheet."""
    found: Any = next(
        (each for each in (result.claims if result else study.claims if study else ()) if each.id == claim_id), None
    )
    if found is None:
        return [html.P("This claim is not part of the study any more.", className="panel-words")]
    facts: list[tuple[str, Any]] = [
        ("published", f"{_published(found.published)} ({found.where})"), ("source of the value", found.source),
        ("evidence", f"{found.evidence}: {EVIDENCE.get(found.evidence, '')}"), ("rule", found.rule),
    ]  # fmt: skip
    if isinstance(found, ClaimResult):
        method = f"{round(100 * found.confidence)} % interval by {found.interval}" if found.interval else ""
        many = f"{found.n} {found.over}" if found.n != 1 else f"1 {found.over.removesuffix('s')}"
        facts += [
            ("ours", f"{ours(found)}" + (f" ({many}{', ' + method if method else ''})" if found.n else "")),
            ("verdict", f"{found.verdict}: {found.reason}"),
            ("values", ", ".join(number(value) for value in found.values[:200])),
        ]  # fmt: skip
    facts.append(("note", found.note))
    lines = [html.Div([html.Dt(name), html.Dd(text)]) for name, text in facts if text]
    return [html.P(found.sentence, className="prose"), html.Dl(lines, className="claim-details")]


# ---- callbacks -------------------------------------------------------------------------------------------------------


def start(services: Services, name: str | None, tier: str | None, seeds: Any) -> tuple[str | None, str]:
    """Start a study: (job id or None, what to tell the reader)."""
    try:
        return start_study(services.jobs, services.store, name, tier, None if seeds in (None, "") else seeds).id, ""
    except (StudyError, JobError) as error:
        return None, str(error)


def exported(services: Services, run_id: str, kind: str) -> dict[str, Any] | None:
    """The file that a reader downloads, as dcc.Download takes it."""
    opened = open_study(services.store, "", run_id)
    if opened.result is None:
        return None
    if kind == "csv":
        return {"content": as_csv(opened.result), "filename": f"{run_id}.csv", "type": "text/csv"}
    content = json.dumps(as_record(opened.result), indent=1, ensure_ascii=False)
    return {"content": content, "filename": f"{run_id}.json", "type": "application/json"}


def register(app: Dash, services: Services) -> None:
    @app.callback(
        Output("go", "data", allow_duplicate=True), Input("cases-grid", "cellClicked"), prevent_initial_call=True
    )
    def open_one(cell: dict[str, Any] | None) -> Any:
        name = str((cell or {}).get("rowId") or "")
        wanted = ViewState.from_url("/cases", f"study={name}").study
        return {"change": {"study": wanted, "result": None}, "page": "/cases"} if wanted else no_update

    @app.callback(
        Output("job", "data", allow_duplicate=True),
        Output("case-message", "children"),
        Input("case-start", "n_clicks"),
        State("case-name", "data"),
        State("case-tier", "value"),
        State("case-seeds", "value"),
        prevent_initial_call=True,
        running=[(Output("case-start", "disabled"), True, False)],
    )
    def start_one(clicks: int, name: str | None, tier: str | None, seeds: Any) -> tuple[Any, str]:
        if not clicks:
            return no_update, ""
        job, words = start(services, name, tier, seeds)
        return (job if job else no_update), words

    @app.callback(Output("case-about", "children"), Input("case-tier", "value"), State("case-name", "data"))
    def about(tier: str | None, name: str | None) -> str:
        opened = open_study(services.store, name or "", "")
        return (
            tier_words(opened.study, tier) if opened.study is not None and tier and tier in opened.study.tiers else ""
        )

    @app.callback(
        Output({"type": "case-figure", "name": MATCH}, "figure"),
        Input("scheme", "data"),
        State({"type": "case-figure", "name": MATCH}, "id"),
        State("case-result", "data"),
    )
    def draw(scheme: str | None, identity: dict[str, str], run_id: str) -> Any:
        try:
            return _figure(open_run(services.store, run_id), identity["name"], theme_called(scheme).name)[0]
        except (RunError, ValueError):
            return no_update

    @app.callback(
        Output("sheet", "opened", allow_duplicate=True),
        Output("sheet", "title", allow_duplicate=True),
        Output("sheet-content", "children", allow_duplicate=True),
        Input("claims-grid", "cellClicked"),
        Input("case-export-python", "n_clicks"),
        State("case-result", "data"),
        State("view", "data"),
        prevent_initial_call=True,
    )
    def open_sheet(cell: dict[str, Any] | None, clicks: int, run_id: str, view: dict[str, Any]) -> tuple[Any, ...]:
        shown = ViewState.from_dict(view)
        opened = open_study(services.store, shown.study, run_id)
        if ctx.triggered_id == "case-export-python":
            if not clicks or opened.result is None:
                return no_update, no_update, no_update
            return True, "Python", dmc.CodeHighlight(code=as_python(opened.result), language="python", id="code")
        if not cell:
            return no_update, no_update, no_update
        return True, "Claim", claim_details(opened.study, opened.result, str(cell.get("rowId")))

    @app.callback(
        Output("case-download", "data"),
        Input("case-export-json", "n_clicks"),
        Input("case-export-csv", "n_clicks"),
        State("case-result", "data"),
        prevent_initial_call=True,
    )
    def export(as_json: int, as_csv_file: int, run_id: str) -> Any:
        clicked = as_json if ctx.triggered_id == "case-export-json" else as_csv_file
        if not clicked or not run_id:
            return no_update
        return exported(services, run_id, str(ctx.triggered_id).rpartition("-")[2]) or no_update


PAGE = Page(
    name="cases",
    title="Case studies",
    icon="cases",
    order=0,
    group="Results",
    words="Does it hold here? Published claims, what was measured, and the verdicts.",
    layout=layout,
    structure=structure,
    register=register,
    needs_run=False,
    opens_kind=KIND,
)

"""What the server tells other tools: metrics for Prometheus, and the interface as an OpenAPI document."""

import json

import httpx
import msgspec
import pytest
import toy_run
from server_process import Client

from edgefed.aggregator.app import Bell, Endpoints
from edgefed.aggregator.metrics import metrics_text
from edgefed.aggregator.openapi import OPERATIONS, openapi_document
from edgefed.protocol import routes

TOKEN = "a-token-that-nobody-guesses"


def one_round(toy) -> None:
    toy.join("anna", "bob", "carl")
    for seed, client in enumerate(("anna", "bob")):
        update = toy.update(client, seed, metrics={"train_loss": 2.0 + seed})
        toy.send(update)
        toy.service.note_download(toy_run.KEY + client, 1000)
    toy.service.leave("carl", toy_run.KEY + "carl", "done")
    toy.run.tick()
    toy.run.fold_pending()


def test_metrics_are_the_numbers_of_the_run(toy):
    one_round(toy)
    text = toy.service.metrics({"known": 3, "stranger": 1})
    received = toy.service.status().history[0].uploaded_bytes
    for line in (
        'edgefed_state{state="waiting"} 0', 'edgefed_state{state="training"} 1', "edgefed_rounds 2",
        "edgefed_rounds_aggregated_total 1", 'edgefed_clients{state="left"} 1', "edgefed_updates_aggregated_total 2",
        f"edgefed_received_bytes_total {received}", "edgefed_sent_bytes_total 2000",
        'edgefed_loss_nats{kind="train"} 2.5', "edgefed_experts 6", "edgefed_experts_trained 6",
        'edgefed_connections{kind="stranger"} 1',
    ):  # fmt: skip
        assert f"\n{line}\n" in text, line
    again = toy.reopen()
    counters = [line for line in text.splitlines() if "_total " in line]
    assert [line for line in again.service.metrics({}).splitlines() if "_total " in line] == counters
    again.close()


def test_prometheus_reads_the_metrics(toy):
    parser = pytest.importorskip("prometheus_client.parser")
    one_round(toy)
    status = toy.service.status()
    hostile = msgspec.structs.replace(
        status, run=msgspec.structs.replace(status.run, model='a "model"\\ of\ntwo lines')
    )
    families = list(parser.text_string_to_metric_families(metrics_text(hostile, toy.service.coverage(), {}, 5)))
    found = {sample.name: sample for family in families for sample in family.samples}
    assert found["edgefed_info"].labels["model"] == 'a "model"\\ of\ntwo lines'
    assert found["edgefed_free_bytes"].value == 5
    assert all(family.documentation and family.type in ("gauge", "counter") for family in families)


def test_what_compression_saves_and_leaves_is_in_the_metrics(toy):
    one_round(toy)
    status = toy.service.status()
    found = {
        "bytes_up_changes": 5.0, "bytes_down_changes": 7.0, "bytes_down_saved": 90.0, "upload_ratio": 36.5,
        "residual_norm": 3.0, "change_norm": 4.0, "model_residual_norm": 1.0, "model_step_norm": 10.0,
    }  # fmt: skip
    done = msgspec.structs.replace(status.history[0], metrics=status.history[0].metrics | found)
    text = metrics_text(msgspec.structs.replace(status, history=(done, done)), toy.service.coverage(), {}, 5)
    experts = 2 * int(done.metrics["bytes_up_experts"])
    assert experts > 0
    for line in (
        f'edgefed_received_kind_bytes_total{{kind="experts"}} {experts}',
        'edgefed_changes_bytes_total{direction="up"} 10', 'edgefed_changes_bytes_total{direction="down"} 14',
        "edgefed_sent_saved_bytes_total 180", "edgefed_upload_ratio 36.5",
        'edgefed_residual_share{of="updates"} 0.75', 'edgefed_residual_share{of="step"} 0.1',
    ):  # fmt: skip
        assert f"\n{line}\n" in text, line


def test_the_document_has_every_route_of_the_server(toy):
    served = {
        (verb, route.path)
        for route in Endpoints(toy.service, Bell()).routes()
        for verb in route.methods - {"HEAD"}
        if route.path.removeprefix("/") not in routes.PAGE_FILES
    }
    assert served == {(operation.verb, operation.path) for operation in OPERATIONS}
    document = openapi_document()
    assert document["paths"]["/v1/health"]["get"]["security"] == []
    assert document["paths"]["/v1/status"]["get"]["security"] == [{"token": []}, {"signature": []}]


def test_both_need_the_token(state, start_server):
    server = start_server(state, token=TOKEN)
    with httpx.Client(base_url=server.url, trust_env=False) as http:
        for path in (routes.METRICS, routes.OPENAPI):
            assert http.get(path).status_code == 401
        owner = {"authorization": f"Bearer {TOKEN}"}
        answer = http.get(routes.METRICS, headers=owner)
        assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert 'edgefed_connections{kind="known"} 1' in answer.text
        assert http.get(routes.OPENAPI, headers=owner).json() == json.loads(json.dumps(openapi_document()))


@pytest.mark.full
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: f"{operation.verb} {operation.path}")
def test_the_server_keeps_to_its_document(state, start_server, operation):
    """Schemathesis makes requests that fit the document and requests that do not; the answers must fit it.

    A request that fits may still be refused, by the state of the run. Wrong tokens are braked, and have their own test.
    """
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis.checks import CHECKS

    server = start_server(state, token=TOKEN)
    client = Client(server.url, "anna", token=TOKEN)
    client.register()
    schema = schemathesis.openapi.from_dict(openapi_document())
    found = schema[operation.path][operation.verb]
    checks = CHECKS.get_by_names(sorted(set(CHECKS.get_all_names()) - {"positive_data_acceptance", "ignored_auth"}))
    fixed = {"path_parameters": {"client_id": "anna"}} if "{client_id}" in operation.path else {}
    modes = schemathesis.GenerationMode
    if operation.path == routes.ASSIGNMENT:
        fixed["query"] = {"wait_s": 0.1}
    valid, invalid = found.as_strategy(modes.POSITIVE, **fixed), found.as_strategy(modes.NEGATIVE)
    for strategy in (valid, invalid) if found.body or found.query or found.path_parameters else (valid,):

        @given(case=strategy)
        @settings(
            max_examples=20, deadline=None, database=None, derandomize=True,
            phases=[Phase.generate], suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        def check(case):
            case.call_and_validate(base_url=server.url, headers=dict(client.http.headers), checks=checks)

        check()
    assert client.status().run.run_id == "run-1"
    assert "Traceback" not in server.log.read_text()

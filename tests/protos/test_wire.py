"""What a client of either wire may rely on, read from the descriptors."""

from __future__ import annotations

import pytest
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor

from edge_agent.policy import Reason
from edge_agent.superiority import METRICS
from routet2i.cloud.v1 import cloud_pb2
from routet2i.edge.v1 import edge_pb2
from routet2i.image.v1 import image_pb2

SERVICES = {
    "routet2i.edge.v1.EdgeAgentService": edge_pb2.DESCRIPTOR.services_by_name["EdgeAgentService"],
    "routet2i.cloud.v1.CloudServerService": cloud_pb2.DESCRIPTOR.services_by_name["CloudServerService"],
}


def rpcs() -> list[MethodDescriptor]:
    return [rpc for service in SERVICES.values() for rpc in service.methods]


@pytest.mark.parametrize("name", SERVICES)
def test_the_services_bear_the_names_that_reflection_lists(name: str) -> None:
    assert SERVICES[name].full_name == name


@pytest.mark.parametrize("rpc", rpcs(), ids=lambda rpc: rpc.full_name)
def test_only_generate_streams_and_it_streams_answers_alone(rpc: MethodDescriptor) -> None:
    assert not rpc.client_streaming
    assert rpc.server_streaming == (rpc.name == "Generate")


@pytest.mark.parametrize("generated", [edge_pb2, cloud_pb2])
def test_every_message_of_the_generate_stream_is_exactly_one_event(generated: object) -> None:
    response = generated.GenerateResponse.DESCRIPTOR  # type: ignore[attr-defined]
    assert [field.name for field in response.oneofs_by_name["event"].fields] == [
        f.name for f in response.fields
    ]


@pytest.mark.parametrize(
    "field", ["seed", "width", "height", "steps", "guidance_scale", "max_price_micro_usd"]
)
def test_zero_and_absent_are_told_apart_where_both_mean_something(field: str) -> None:
    request = image_pb2.ImageRequest()
    assert not request.HasField(field)
    setattr(request, field, 0)
    assert image_pb2.ImageRequest.FromString(request.SerializeToString()).HasField(field)


def test_the_wire_has_every_reason_of_the_policy() -> None:
    on_the_wire = {name.removeprefix("DECISION_REASON_").lower() for name in edge_pb2.DecisionReason.keys()}  # noqa: SIM118 - an enum wrapper is no dict
    assert on_the_wire - {"unspecified"} == {reason.value for reason in Reason}


def test_money_is_a_whole_number_on_every_message() -> None:
    money = [
        field
        for generated in (image_pb2, edge_pb2, cloud_pb2)
        for message in generated.DESCRIPTOR.message_types_by_name.values()
        for field in message.fields
        if field.name.endswith("_micro_usd")
    ]
    assert len(money) >= 10
    assert {field.type for field in money} == {FieldDescriptor.TYPE_INT64}


def test_a_decision_carries_any_prediction_and_any_prompt_unchanged() -> None:
    quality = [edge_pb2.MetricValue(name=name, value=0.1 * k) for k, name in enumerate(METRICS)]
    decision = edge_pb2.Decision(
        route=edge_pb2.ROUTE_CLOUD,
        reason=edge_pb2.DECISION_REASON_PARETO_CLOUD,
        prs=0.25,
        alpha=0.5,
        edge_quality=quality,
        cloud_quality=quality,
        tokens=[edge_pb2.TokenPull(text="🦉 Ωø\n", pull=quality)],
    )
    assert edge_pb2.Decision.FromString(decision.SerializeToString()) == decision

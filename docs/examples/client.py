"""An app that asks the edge agent for a picture: `python client.py PROMPT FILE`."""

import os
import sys
from pathlib import Path

import grpc

from edge_agent.settings import default_address
from routet2i.edge.v1 import edge_pb2, edge_pb2_grpc
from routet2i.image.v1 import image_pb2

request, png = edge_pb2.GenerateRequest(image=image_pb2.ImageRequest(prompt=sys.argv[1], app="example")), b""
options = [("grpc.enable_http_proxy", 0), ("SingleThreadedUnaryStream", 1)]  # the second saves 0.3 ms
with grpc.insecure_channel(os.environ.get("EDGE_AGENT_ADDRESS") or default_address(), options) as channel:
    for event in edge_pb2_grpc.EdgeAgentServiceStub(channel).Generate(request, timeout=120):
        png += event.image_chunk.data  # empty in every event that is not a chunk
Path(sys.argv[2]).write_bytes(png)
made = event.result
print(f"made by: {edge_pb2.Route.Name(made.served_by)} for {made.cost_micro_usd} micro-dollars")

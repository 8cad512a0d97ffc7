"""The committed generated code is what the proto gives."""

import subprocess
import sys
from pathlib import Path

from google.protobuf import descriptor_pb2

from online.generated import tower_pb2 as pb
from online.servicer import RECOMMENDER, SERVICE

ONLINE = Path(pb.__file__).parents[1]


def test_generated_code_is_current(tmp_path: Path) -> None:
    """Descriptors are compared, not source: the generator's own version may differ."""
    out = tmp_path / "tower.bin"
    command = [sys.executable, "-m", "grpc_tools.protoc", f"--proto_path=online/generated={ONLINE}"]
    subprocess.run([*command, f"--descriptor_set_out={out}", "online/generated/tower.proto"], check=True)
    fresh = descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file[0]
    committed = descriptor_pb2.FileDescriptorProto()
    pb.DESCRIPTOR.CopyToProto(committed)
    for file in (fresh, committed):  # names that only JSON uses
        for message in file.message_type:
            for field in message.field:
                field.ClearField("json_name")
            for nested in message.nested_type:
                for field in nested.field:
                    field.ClearField("json_name")
    assert committed == fresh, "run `make proto`"


def test_the_service_has_its_name() -> None:
    service = pb.DESCRIPTOR.services_by_name["UserTower"]
    assert service.full_name == SERVICE
    assert [method.name for method in service.methods] == ["Embed", "EmbedBatch"]


def test_the_recommender_has_its_name() -> None:
    service = pb.DESCRIPTOR.services_by_name["Recommender"]
    assert service.full_name == RECOMMENDER
    assert [method.name for method in service.methods] == ["Retrieve"]


def test_a_reply_can_be_spliced() -> None:
    """Packed floats on the wire are the bytes of the array."""
    reply = pb.EmbedReply(embedding=[1.0, -2.0])
    assert reply.SerializeToString() == b"\x0a\x08" + b"\x00\x00\x80\x3f\x00\x00\x00\xc0"

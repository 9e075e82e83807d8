"""Build the classes of the Open Inference Protocol's gRPC messages.

The fields' names and order, which determines their numbers, are those of
github.com/kserve/open-inference-protocol (specification/protocol/open_inference_grpc.proto).
Nested messages are top-level messages here, and a map is a list of `Parameter`, which does not
change the wire format.
"""

from types import SimpleNamespace

from google.protobuf.descriptor_pb2 import DescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

_TENSOR = "name:string datatype:string shape:int64*"
_MODEL = "name:string version:string"
_INFER = "model_name:string model_version:string id:string parameters:Parameter*"
# `*` marks a repeated field.
_MESSAGES = {
    "ServerLiveRequest": "",
    "ServerLiveResponse": "live:bool",
    "ServerReadyRequest": "",
    "ServerReadyResponse": "ready:bool",
    "ModelReadyRequest": _MODEL,
    "ModelReadyResponse": "ready:bool",
    "ServerMetadataRequest": "",
    "ServerMetadataResponse": f"{_MODEL} extensions:string*",
    "ModelMetadataRequest": _MODEL,
    "ModelMetadataResponse": "name:string versions:string* platform:string "
    "inputs:TensorMetadata* outputs:TensorMetadata*",
    "TensorMetadata": _TENSOR,
    "ModelInferRequest": f"{_INFER} inputs:InferInputTensor* outputs:InferRequestedOutputTensor* "
    "raw_input_contents:bytes*",
    "InferInputTensor": f"{_TENSOR} parameters:Parameter* contents:InferTensorContents",
    "InferRequestedOutputTensor": "name:string parameters:Parameter*",
    "ModelInferResponse": f"{_INFER} outputs:InferOutputTensor* raw_output_contents:bytes*",
    "InferOutputTensor": f"{_TENSOR} parameters:Parameter* contents:InferTensorContents",
    "Parameter": "key:string value:InferParameter",
    # A oneof, `parameter_choice`.
    "InferParameter": "bool_param:bool int64_param:int64 string_param:string double_param:double "
    "uint64_param:uint64",
    "InferTensorContents": "bool_contents:bool* int_contents:int32* int64_contents:int64* "
    "uint_contents:uint32* uint64_contents:uint64* fp32_contents:float* fp64_contents:double* "
    "bytes_contents:bytes*",
}


def _build() -> SimpleNamespace:
    file = FileDescriptorProto(name="open_inference.proto", package="inference", syntax="proto3")
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for number, text in enumerate(fields.split(), 1):
            _add(message, number, *text.split(":"))
        if name == "InferParameter":
            message.oneof_decl.add(name="parameter_choice")
            for field in message.field:
                field.oneof_index = 0
    pool = DescriptorPool()
    pool.Add(file)
    found = {n: GetMessageClass(pool.FindMessageTypeByName(f"inference.{n}")) for n in _MESSAGES}
    return SimpleNamespace(**found)


def _add(message: DescriptorProto, number: int, name: str, kind: str) -> None:
    field = message.field.add(name=name, number=number)
    field.label = field.LABEL_REPEATED if kind.endswith("*") else field.LABEL_OPTIONAL
    kind = kind.rstrip("*")
    if kind[0].isupper():
        field.type, field.type_name = field.TYPE_MESSAGE, f".inference.{kind}"
    else:
        field.type = getattr(field, f"TYPE_{kind.upper()}")


messages = _build()

"""Build the classes of the Open Inference Protocol's gRPC messages.

The fields' names and order, which determines their numbers, are those of
github.com/kserve/open-inference-protocol (specification/protocol/open_inference_grpc.proto).
Nested messages are top-level messages here, which does not change the wire format.
"""

from types import SimpleNamespace

from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto
from google.protobuf.descriptor_pb2 import FileDescriptorProto as File
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

_TENSOR = "name:string datatype:string shape:int64*"
_MODEL = "name:string version:string"
_INFER = "model_name:string model_version:string id:string parameters:map"
# `*` marks a repeated field; `map` is a map from string to InferParameter.
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
    "InferInputTensor": f"{_TENSOR} parameters:map contents:InferTensorContents",
    "InferRequestedOutputTensor": "name:string parameters:map",
    "ModelInferResponse": f"{_INFER} outputs:InferOutputTensor* raw_output_contents:bytes*",
    "InferOutputTensor": f"{_TENSOR} parameters:map contents:InferTensorContents",
    # A oneof, `parameter_choice`.
    "InferParameter": "bool_param:bool int64_param:int64 string_param:string double_param:double "
    "uint64_param:uint64",
    "InferTensorContents": "bool_contents:bool* int_contents:int32* int64_contents:int64* "
    "uint_contents:uint32* uint64_contents:uint64* fp32_contents:float* fp64_contents:double* "
    "bytes_contents:bytes*",
}


def _build() -> SimpleNamespace:
    file = File(name="open_inference.proto", package="inference", syntax="proto3")
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        if name == "InferParameter":
            message.oneof_decl.add(name="parameter_choice")
        for number, text in enumerate(fields.split(), 1):
            field_name, kind = text.split(":")
            field = _add(message, field_name, number, kind)
            if name == "InferParameter":
                field.oneof_index = 0
            if kind == "map":
                entry = message.nested_type.add(name="ParametersEntry")
                entry.options.map_entry = True
                _add(entry, "key", 1, "string")
                _add(entry, "value", 2, "InferParameter")
                field.type_name = f".inference.{name}.ParametersEntry"
    pool = DescriptorPool()
    pool.Add(file)
    found = {n: GetMessageClass(pool.FindMessageTypeByName(f"inference.{n}")) for n in _MESSAGES}
    return SimpleNamespace(**found)


def _add(message: DescriptorProto, name: str, number: int, kind: str) -> FieldDescriptorProto:
    field = message.field.add(name=name, number=number)
    repeated = kind == "map" or kind.endswith("*")
    field.label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
    kind = kind.rstrip("*")
    if kind == "map" or kind[0].isupper():
        field.type = field.TYPE_MESSAGE
        field.type_name = f".inference.{kind}"
    else:
        field.type = getattr(field, f"TYPE_{kind.upper()}")
    return field


messages = _build()

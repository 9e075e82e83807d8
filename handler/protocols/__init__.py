"""Parse a request's parts and headers into images and options, with one module per protocol.

To add a protocol, write a subclass of `handler.request.Protocol` in a new module and a case in
`_protocol_of`.
"""

from handler.archive import Archive
from handler.errors import BadRequest, MissingImage, NoEmbedding, NoExplanation
from handler.inference.engines import Extra
from handler.protocols.accept import prefers
from handler.protocols.content_encoding import decompress_body
from handler.protocols.forms import Form, JsonImage, form_fields, is_form
from handler.protocols.huggingface import HuggingFace, is_huggingface
from handler.protocols.json_body import JsonBody, is_empty, parse_json, release_body
from handler.protocols.kserve_v1 import KServeV1
from handler.protocols.kserve_v2 import KServeV2
from handler.protocols.options import find_class, parse_options, parse_query
from handler.request import Protocol, Purpose, Request

_HOW_TO_SEND = (
    "Send the file as the body (curl -T cat.jpg URL) or in a form (curl -F file=@cat.jpg URL)."
)


def parse(request: Request, archive: Archive) -> None:
    """Set a request's purpose, protocol, options and images.

    Raises:
        ClientError: the request holds no image, too many, or an option with an invalid value. An
            error that concerns one of several images is stored on that image.
    """
    if _is_description(request):
        request.purpose = Purpose.DESCRIBE
        return
    if is_empty(request.row.get("body")) and prefers(request, "text/html", "application/json"):
        request.purpose = Purpose.WEB_UI
        return
    if request.headers.get("explain") == "True":
        request.purpose = Purpose.EXPLAIN
    decompress_body(request)
    request.options = parse_options(parse_query(request), request.options)
    request.options = parse_options(form_fields(request), request.options)
    body = parse_json(request)
    protocol = request.protocol = _protocol_of(request, body)
    protocol.parse(request, body, archive)
    if body is not None:
        body.binary.check_used()
        del body  # may reference the request's bytes
        release_body(request)
    if not request.images:
        raise MissingImage(f"The request holds no image. {_HOW_TO_SEND}")
    _check_model_has(request.extra, archive)
    for image in request.images:
        image.extra = request.extra
    if request.purpose is Purpose.EXPLAIN:
        request.class_index = find_class(request.options, archive.labels)
        request.heat_map = _wants_heat_map(request, protocol)


def _is_description(request: Request) -> bool:
    """Return whether the request is `GET /models/{name}?customized=true` of the management API.

    Only this call has no parts: a request to the inference API with the same header has its body
    as a part, unless its Content-Type is a form's.
    """
    return request.headers.get("describe") == "True" and not request.row and not is_form(request)


def _protocol_of(request: Request, body: JsonBody | None) -> Protocol:
    if request.purpose is Purpose.CLASSIFY and is_huggingface(request):
        return HuggingFace()
    if body is None:
        return Form()
    if "instances" in body.document:
        return KServeV1()
    # Text in "inputs" is not a tensor but a Hugging Face client's image.
    if not isinstance(body.document.get("inputs", ""), str):
        return KServeV2()
    return JsonImage()


def _check_model_has(extra: Extra | None, archive: Archive) -> None:
    if extra is Extra.FEATURES and not archive.card.features:
        raise NoExplanation(
            f"The architecture {archive.card.architecture} has no class activation map: its "
            "logits are no linear function of its last features. DenseNets and ResNets, among "
            "others, have one."
        )
    if extra is Extra.EMBEDDING and not archive.card.embedding:
        raise NoEmbedding(
            "This archive gives no embeddings: it was built for PyTorch (engine: torch), or "
            "its last layer is no linear one. Those for ONNX Runtime of most architectures do."
        )


def _wants_heat_map(request: Request, protocol: Protocol) -> bool:
    """Return whether to draw a heat map; the `Accept` header or the protocol can select numbers."""
    if type(protocol) not in {Form, JsonImage} or prefers(request, "application/json", "image/png"):
        return False
    if len(request.images) > 1:
        raise BadRequest(
            f"The request holds {len(request.images)} images, and a heat map explains only one. "
            "Send one, or ask for numbers with the header Accept: application/json."
        )
    return True

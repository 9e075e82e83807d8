"""Hugging Face's image-classification task, as sent by clients of its Inference API.

A raw image or `{"inputs": "<base64>", "parameters": {"top_k": 3}}` -> `[{"label", "score"}, ...]`.
The protocol has its own path, since its bodies cannot be distinguished from KServe V2's or a file.

Source: https://huggingface.co/docs/inference-providers/tasks/image-classification
"""

from handler.archive import Archive
from handler.errors import BadRequest, InvalidOption
from handler.protocols.forms import Form
from handler.protocols.json_body import JsonBody, json_image
from handler.protocols.options import parse_options, quoted
from handler.request import Protocol, Request, Response, json_response

# The last segment of the path on TorchServe, /predictions/MODEL/VERSION/huggingface, which
# TorchServe passes on in the first header. The gateway and the container send the second header.
_NAME = "huggingface"
_HEADERS = ("url_path", "x-protocol")


def is_huggingface(request: Request) -> bool:
    """Return whether the request came to the path of this protocol."""
    return any(request.header(header).strip("/") == _NAME for header in _HEADERS)


class HuggingFace(Protocol):
    """One image per request."""

    def parse(self, request: Request, body: JsonBody | None, archive: Archive) -> None:
        if body is None:
            Form().parse(request, None, archive)
        else:
            parameters = body.document.get("parameters") or {}
            if not isinstance(parameters, dict):
                raise BadRequest('"parameters" must be an object, such as {"top_k": 3}.')
            activation = parameters.get("function_to_apply")
            if activation is not None and activation != archive.card.activation:
                raise InvalidOption(
                    f"function_to_apply must be {archive.card.activation}, this model's, "
                    f"got {quoted(activation)}."
                )
            if parameters.get("top_k") is not None:
                request.options = parse_options({"topk": parameters["top_k"]}, request.options)
            if "inputs" in body.document:
                request.images = [json_image(request, "inputs", body.document["inputs"])]
        if len(request.images) > 1:
            raise BadRequest("Hugging Face's image classification takes one image per request.")

    def format(self, request: Request, archive: Archive) -> Response:
        (image,) = request.images
        assert image.result is not None
        predictions = image.result["predictions"]
        return json_response(
            [{"label": p["label"], "score": p["probability"]} for p in predictions]
        )

"""KServe V1, TensorFlow Serving's protocol: `{"instances": [...]}` -> `{"predictions": [...]}`."""

from handler.archive import Archive
from handler.protocols.json_body import JsonBody
from handler.request import Protocol, Purpose, Request, Response, json_response
from handler.results import result_of


class KServeV1(Protocol):
    """Each instance is base64 text, or an object that holds it, such as `{"b64": "<base64>"}`."""

    def parse(self, request: Request, body: JsonBody | None, archive: Archive) -> None:
        assert body is not None
        body.parse_options(request)
        body.parse_images(request, "instances", archive.settings.max_images)

    def format(self, request: Request, archive: Archive) -> Response:
        results = [result_of(image) for image in request.images]
        key = "explanations" if request.purpose is Purpose.EXPLAIN else "predictions"
        return json_response({key: results, **archive.warning})

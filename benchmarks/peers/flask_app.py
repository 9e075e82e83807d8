"""The Flask tutorial's server: `flask run`, or the same under gunicorn."""

import io
from typing import Any

import torch
from flask import Flask, jsonify, request
from PIL import Image
from torchvision import transforms
from torchvision.models import densenet121

from benchmarks.peers.common import FILES, LABELS

app = Flask(__name__)
model = densenet121()
model.load_state_dict(torch.load(FILES / "weights.pth", weights_only=True))
model.eval()
transform = transforms.Compose(
    [
        transforms.Resize(255),
        transforms.CenterCrop(224),
        transforms.ToTensor(),
        transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ]
)


@app.route("/predict", methods=["POST"])
def predict() -> Any:
    """Classify an upload in `file`."""
    image = Image.open(io.BytesIO(request.files["file"].read()))
    outputs = model(transform(image).unsqueeze(0))
    class_id, class_name = LABELS[str(outputs.max(1).indices.item())]
    return jsonify({"class_id": class_id, "class_name": class_name})

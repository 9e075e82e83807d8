"""Create torchvision's classifiers, for the PyTorch engine and the archive builder.

torchvision takes 160 MB of memory, so workers with another engine never import this module.
"""

from typing import Any

import torchvision
from torchvision.models import feature_extraction

INCEPTIONS = ("googlenet", "inception_v3")


def empty_model(architecture: str, classes: int) -> Any:
    """Return one of torchvision's classifiers in evaluation mode, without its weights.

    The two Inception models come without the auxiliary classifiers used only in training, and scale
    their input as torchvision's weights expect. Vision transformers take images of the size that
    their best weights were trained with.
    """
    options: dict[str, Any] = {"num_classes": classes}
    if architecture.startswith("vit_"):
        # A vision transformer's image size is fixed.
        preset = torchvision.models.get_model_weights(architecture).DEFAULT.transforms()
        options["image_size"] = preset.crop_size[0]
    if architecture in INCEPTIONS:
        options |= {"aux_logits": False, "transform_input": True, "init_weights": False}
    model = torchvision.models.get_model(architecture, weights=None, **options)
    return model.eval()


def with_features(model: Any, node: str) -> Any:
    """Return the model with the outputs "logits" and "features", the latter from node `node`."""
    last = feature_extraction.get_graph_node_names(model, suppress_diff_warning=True)[1][-1]
    return feature_extraction.create_feature_extractor(
        model, {last: "logits", node: "features"}, suppress_diff_warning=True
    ).eval()

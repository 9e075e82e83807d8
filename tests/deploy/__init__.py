"""Manifests, images and monitoring. Checks of schemas must also find a deliberate mistake."""

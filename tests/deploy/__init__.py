"""What is deployed elsewhere: manifests and image. Each check must find a deliberate mistake."""

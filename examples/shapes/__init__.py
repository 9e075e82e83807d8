"""Several shapes a picture: a ResNet trained, packed and served that gives several labels."""

"""What the mask costs two pretrained models that a package index holds: fetched, evaluated, drawn."""

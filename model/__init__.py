"""The hybrid tower: PyTorch model, featuriser, training and releases. Imports neither Beam, Feast, Redis nor gRPC."""

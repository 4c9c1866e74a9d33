"""Native TensorRT and TensorRT-RTX engines. Experimental: they have never run on a GPU."""

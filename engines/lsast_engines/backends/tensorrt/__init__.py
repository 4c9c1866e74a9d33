"""Native TensorRT and TensorRT-RTX engines. Experimental: no machine here had a GPU."""

"""Dense pages: keys and values as they are, in float16, bfloat16 or float32."""

"""What is measured and checked with the loaded model before the first request.

- `decode_probe`: whether requests may be decoded together, and whether a step may be traced; at the
  end one decode step, which compiles its kernels.
- `key_samples`: keys of a calibration text, for the constants of TurboQuant's codecs.
- `loss_check`: what the chosen formats cost this model, which may be too much to start.
- `workspace_probe`: the memory of small prefill and decode steps, from which the plan follows.

`compression` asks for the two results that only TurboQuant needs, and `prompt_beginning` says how
the texts begin that the model is measured on. `result_cache` keeps these results on disk,
`dependencies` says what each of them depends on, and `crash_marker` remembers a start that tracing
has killed.
"""

"""Run files of other frameworks: what each of their keys is here. Facts only; the engine is rlcore.config.foreign."""

"""The model that Triton's Python backend runs: an explainer. One execution answers many requests, by few runs."""

from __future__ import annotations

import json
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

from ...questions import Question, answers
from ...runtime.backends import Settings, create
from ...runtime.bundle.reading import read_bundle
from ...runtime.errors import CamrtError, first_line
from ...runtime.explainer import Explainer
from ...runtime.explanation import Explanation
from ...tensors import INPUTS, read_question, read_tensors, write_tensors


class TritonPythonModel:
    """Triton calls initialize once for each instance, then execute with the requests of one dynamic batch."""

    def initialize(self, args: dict[str, str]) -> None:
        """args: as Triton gives them. What fails here is in Triton's log, and the model is not ready."""
        import triton_python_backend_utils as triton  # type: ignore[import-not-found]  # Triton's own, in its process

        self._triton = triton
        config = json.loads(args["model_config"])
        settings = {name: value["string_value"] for name, value in config["parameters"].items()}
        bundle = Path(args["model_repository"]) / args["model_version"] / settings["bundle"]
        on_gpu = args["model_instance_kind"] == "GPU"
        threads = int(settings["threads"]) if settings.get("threads") else None
        device = int(args["model_instance_device_id"]) if on_gpu else 0
        batch = max(int(config["max_batch_size"]), 1)
        backend = create(settings["backend"], Settings(threads, device, batch))
        if on_gpu and backend.gpu is None:
            raise RuntimeError(f"{args['model_name']}: an instance on a GPU, and {backend} is not on one")
        self._explainer = Explainer(read_bundle(bundle), backend, batch, settings.get("precision") or None)
        self._method, self._pixels = settings["method"], int(settings["pixels"])

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answers every request; a wrong one is answered INVALID_ARG, and spoils no other."""
        read: list[list[Question] | Exception] = [self._read(request) for request in requests]
        together: dict[Hashable, list[tuple[int, Question]]] = {}
        for number, questions in enumerate(read):
            if not isinstance(questions, Exception):
                for one in questions:
                    together.setdefault(one.key, []).append((number, one))
        found: list[list[Explanation | Exception]] = [[] for _ in requests]
        for asked in together.values():
            for (number, _), answer in zip(asked, self._answers([q for _, q in asked]), strict=True):
                found[number].append(answer)
        return [
            self._response(questions if isinstance(questions, Exception) else answered)
            for questions, answered in zip(read, found, strict=True)
        ]

    def _read(self, request: Any) -> list[Question] | Exception:
        try:
            tensors = {name: self._triton.get_input_tensor_by_name(request, name) for name in INPUTS}
            inputs = {name: tensor.as_numpy() for name, tensor in tensors.items() if tensor is not None}
            if "picture" in inputs:
                inputs["picture"] = [bytes(p) for p in inputs["picture"].ravel()]
            asked = read_tensors(inputs, json.loads(request.parameters() or "{}"), self._method)
            rows = zip(asked.images, asked.options, asked.targets, strict=True)
            return [
                read_question(self._explainer, image, asked.method, options, asked.layers, target, self._pixels)
                for image, options, target in rows
            ]
        except Exception as error:
            return error

    def _answers(self, questions: list[Question]) -> Sequence[Explanation | Exception]:
        try:
            return answers(self._explainer, questions)
        except Exception as error:  # not of one image alone: for all that share the run
            return [error] * len(questions)

    def _response(self, answered: Exception | Sequence[Explanation | Exception]) -> Any:
        said = [answered] if isinstance(answered, Exception) else answered
        for error in said:
            if isinstance(error, Exception):
                return self._triton.InferenceResponse(error=self._error(error))
        tensors = write_tensors([e for e in said if not isinstance(e, Exception)])
        return self._triton.InferenceResponse([self._triton.Tensor(*named) for named in tensors.items()])

    def _error(self, error: Exception) -> Any:
        if isinstance(error, CamrtError):
            return self._triton.TritonError(str(error), self._triton.TritonError.INVALID_ARG)
        self._triton.Logger.log_error(f"camrt: {type(error).__name__}: {first_line(error)}")
        internal = self._triton.TritonError.INTERNAL
        return self._triton.TritonError("the model failed: the server's log says why", internal)

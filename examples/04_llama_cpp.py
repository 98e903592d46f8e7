"""Run a GGUF file in llama.cpp from Python, and the checkpoint it was made from in transformers.

python examples/04_llama_cpp.py FILE.gguf CHECKPOINT "The old man opened the door"

Needs the package xllamacpp. Both continue the text greedily; exit code 1 if the tokens differ.
"""

import sys

import xllamacpp

import secateur as sc

if len(sys.argv) != 4:
    sys.exit("usage: python examples/04_llama_cpp.py FILE.gguf CHECKPOINT TEXT")
file, checkpoint, text = sys.argv[1:]
loaded = sc.load(checkpoint, dtype="float32")  # as llama.cpp computes with an f32 file
ids = loaded.tokenizer(text, return_tensors="pt").input_ids
wanted = loaded.model.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :].tolist()

params = xllamacpp.CommonParams()
params.model.path = file
params.n_gpu_layers, params.warmup, params.verbosity = 0, False, 0
server = xllamacpp.Server(params)
request = {"prompt": text, "max_tokens": 16, "temperature": 0.0, "logprobs": 1}
answer = server.handle_completions(request)["choices"][0]
found = [token["id"] for token in answer["logprobs"]["content"]]

for name, continuation in (("transformers", loaded.tokenizer.decode(wanted)), ("llama.cpp", answer["text"])):
    print(f"{name}: {' '.join((text + continuation).split())}")
print("the same tokens" if found == wanted else "other tokens")
sys.exit(found != wanted)

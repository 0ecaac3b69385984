"""LoRA adapters on disk, between the forms of NeMo AutoModel, PEFT and vLLM: `convert_lora`. No torch is loaded.

The table of names is `layout.lora`. `opening` reads an adapter's directory into plain tensors, whatever its form, with
`config` for the documents, `names` and `stored` for the tensors. `forms` and `documents` are the way back to a form,
`scales` has the scales of the base, and `writing` the new directory. `changes` has the change of each weight, for a
merge.

May import: errors, version, sizes, layout, kernels, checkpoint, target, hub.
"""

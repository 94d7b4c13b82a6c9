"""The models: image tokenizer and detokenizer, the multimodal language model, frozen encoders, image decoders."""

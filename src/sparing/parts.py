"""The one table of our own parts: name → where it lives and what it is, in one line.

Reading it imports nothing, so ``sparing list`` answers at once. Third parties add parts of their own through entry
points of the groups ``sparing.tasks``, ``sparing.steps``, ``sparing.models``, ``sparing.predictors`` and
``sparing.operations``.
"""

from __future__ import annotations

from typing import NamedTuple


class Part(NamedTuple):
    """Where a part lives (``"module:Class"``) and the first line of its docstring."""

    target: str
    summary: str


PARTS: dict[str, dict[str, Part]] = {
    "tasks": {
        "fashion_mnist": Part(
            "sparing.tasks.images.published:FashionMNIST",
            "Fashion-MNIST: grey images of clothes, 28×28, 10 classes (Xiao, Rasul and Vollgraf 2017).",
        ),
        "cifar10": Part(
            "sparing.tasks.images.published:CIFAR10",
            "CIFAR-10: colour images of animals and vehicles, 32×32, 10 classes (Krizhevsky 2009).",
        ),
        "cifar100": Part(
            "sparing.tasks.images.published:CIFAR100",
            "CIFAR-100: colour images of animals, plants, things and people, 32×32, 100 classes (Krizhevsky 2009).",
        ),
        "image_folder": Part(
            "sparing.tasks.images.folder:ImageFolder",
            "Your own images: a folder (or zip file) of class sub-folders, with or without train/val/test above them.",
        ),
        "coco_detection": Part(
            "sparing.tasks.images.detection:CocoDetection",
            "Your own images with boxes: a folder with annotation files in COCO's format, for detection.",
        ),
        "coco_segmentation": Part(
            "sparing.tasks.images.segmentation:CocoSegmentation",
            "Your own images with masks: a folder with annotation files in COCO's format, a class for each pixel.",
        ),
        "emoji80_detection": Part(
            "sparing.tasks.images.detection:Emoji80Detection",
            "Rendered scenes of emoji on photographs, 96×96, with boxes of 80 kinds: 3,000 to train on and 600 to "
            "measure.",
        ),
        "emoji80_segmentation": Part(
            "sparing.tasks.images.segmentation:Emoji80Segmentation",
            "Rendered scenes of emoji on photographs, 96×96, a class for each pixel: 3,000 to train on and 600 to "
            "measure.",
        ),
        "sign_digits": Part(
            "sparing.tasks.images.sign_digits:SignDigits",
            "Sign-language digits: colour photographs of hands, 64×64, 10 classes, people disjoint (Mavi 2020).",
        ),
        "cora": Part(
            "sparing.tasks.graphs.published:Cora",
            "Cora: papers on machine learning and their citations, 7 subjects (split of Yang et al. 2016).",
        ),
        "citeseer": Part(
            "sparing.tasks.graphs.published:Citeseer",
            "Citeseer: papers on computer science and their citations, 6 subjects (split of Yang et al. 2016).",
        ),
        "recidivism": Part(
            "sparing.tasks.graphs.groups:Recidivism",
            "Recidivism: 18,876 people released from prison, by whether they came back; groups by race.",
        ),
        "credit_default": Part(
            "sparing.tasks.graphs.groups:CreditDefault",
            "Credit default: 30,000 holders of credit cards, by whether they paid; groups by age.",
        ),
        "german_credit": Part(
            "sparing.tasks.graphs.groups:GermanCredit",
            "German credit: 1,000 clients of a bank, good ones or not; groups by gender.",
        ),
        "node_table": Part(
            "sparing.tasks.graphs.groups:NodeTableTask",
            "Your own graph of people: rows of a table with edges between them and a sensitive attribute, in an npz.",
        ),
        "mutag": Part(
            "sparing.tasks.graphs.sets:Mutag",
            "MUTAG: 188 molecules of up to 28 atoms, mutagenic or not (Debnath et al. 1991, in the form of TUDataset).",
        ),
        "nci1": Part(
            "sparing.tasks.graphs.sets:NCI1",
            "NCI1: 4,110 molecules, active against lung cancer cells or not (Wale and Karypis 2006, as in TUDataset).",
        ),
        "proteins": Part(
            "sparing.tasks.graphs.sets:Proteins",
            "PROTEINS: 1,113 proteins as graphs of their helices, sheets and turns, enzymes or not (Borgwardt et al. "
            "2005).",
        ),
        "dd": Part(
            "sparing.tasks.graphs.sets:DD",
            "D&D: 1,178 proteins as graphs of their amino acids, enzymes or not (Dobson and Doig 2003, as in "
            "TUDataset).",
        ),
        "tu_folder": Part(
            "sparing.tasks.graphs.sets:TuFolder",
            "Your own graphs: a folder of text files as those of the TUDataset collection, or an npz of the same "
            "content.",
        ),
        "sst2": Part(
            "sparing.tasks.text.published:SST2",
            "SST-2: phrases of film reviews, negative or positive (Socher et al. 2013, in the form of GLUE).",
        ),
        "ag_news": Part(
            "sparing.tasks.text.published:AGNews",
            "AG News: articles on four topics, World, Sports, Business or Sci/Tech (Zhang, Zhao and LeCun 2015).",
        ),
        "trec": Part(
            "sparing.tasks.text.published:TREC",
            "TREC: questions by what they ask for, 6 coarse classes or 50 fine ones (Li and Roth 2002).",
        ),
        "squad": Part(
            "sparing.tasks.text.squad:Squad",
            "SQuAD v1.1: find the span of a passage that answers a question (Rajpurkar et al. 2016).",
        ),
        "text_file": Part(
            "sparing.tasks.text.own:TextFile",
            "Your own texts: a TSV or CSV file with a column of texts and one of labels, or a folder train/val/test of "
            "such.",
        ),
        "hflights": Part(
            "sparing.tasks.ctr.hflights:HFlights",
            "Flights from Houston in 2011: does one arrive over 15 minutes late? 223,874 rows, a fifth of them late.",
        ),
        "click_table": Part(
            "sparing.tasks.ctr.own:ClickTable",
            "Your own table of rows with a label 0 or 1: a CSV, TSV or Parquet file, or a folder train/val/test of "
            "such.",
        ),
        "gesture_events": Part(
            "sparing.tasks.events.gestures:GestureEvents",
            "Simulated events of hands that wave, circle, turn, approach and recede: 32×32 pixels, 8 motions, people "
            "disjoint.",
        ),
        "dvs128_gesture": Part(
            "sparing.tasks.events.gestures:DVSGesture",
            "DVS128 Gesture: recordings of 11 hand and arm gestures by 29 people, 128×128 pixels (Amir et al. 2017).",
        ),
        "event_folder": Part(
            "sparing.tasks.events.own:EventFolder",
            "Your own recordings: a folder of class sub-folders of npz or AEDAT 3.1 files, with or without "
            "train/val/test.",
        ),
        "masked_lm": Part(
            "sparing.tasks.text.masked_lm:MaskedLM",
            "Masked language modelling: pre-train a text encoder on unlabelled texts (Devlin et al. 2019).",
        ),
        "tiny_shakespeare": Part(
            "sparing.tasks.text.language_modelling:TinyShakespeare",
            "Tiny Shakespeare: characters of 40,000 lines of plays, one after the other (Karpathy 2015).",
        ),
        "us_addresses": Part(
            "sparing.tasks.text.language_modelling:UsAddresses",
            "Addresses of US presidents: byte pairs of 124 documents since 1789, each line a sample of its own length.",
        ),
        "text_corpus": Part(
            "sparing.tasks.text.language_modelling:TextCorpus",
            'Your own corpus for language modelling: text files, or JSONL with the key "text", as characters or byte '
            "pairs.",
        ),
        "continual": Part(
            "sparing.tasks.continual:Continual",
            "Several tasks in a row for one model: a set of images under permutations of pixels, or its classes in "
            "blocks.",
        ),
        "digits": Part(
            "sparing.tasks.images.digits:Digits", "Handwritten digits of 8×8 pixels, embedded in scikit-learn."
        ),
    },
    "steps": {
        "block_prune": Part(
            "sparing.compression.pruning:BlockPrune",
            "Prune blocks of weights in the next training, gradually, by their magnitude.",
        ),
        "shrink": Part(
            "sparing.compression.shrinking:Shrink",
            "Cut whole neurons, channels and attention heads out of the model, so that it is smaller in every runtime.",
        ),
        "lock_pattern": Part(
            "sparing.compression.pruning:LockPattern",
            "Keep the zeros of a pruned model through the next training.",
        ),
        "audit_backdoor": Part(
            "sparing.audits.backdoor.step:AuditBackdoor",
            "Look for a backdoor in the training set or the network, and measure which defences would notice one.",
        ),
        "augment": Part(
            "sparing.data.augmentation:Augment",
            "Change the training images at random whenever they are read: crops, colours, RandAugment.",
        ),
        "block_scaling": Part(
            "sparing.adaptive.block_scaling:BlockScaling",
            "Cut the network into blocks of several sizes each, of which the most accurate within given limits serve.",
        ),
        "compile": Part(
            "sparing.compression.compiling:Compile",
            "Compile a text encoder for the CPU engine: INT8, with zeros in 4×1 blocks left out where that is faster.",
        ),
        "condense": Part(
            "sparing.condensation.step:Condense",
            "Replace the training data by a few samples: synthetic ones that teach nearly as much, or a chosen core "
            "set.",
        ),
        "curriculum": Part(
            "sparing.data_efficiency.curriculum:Curriculum",
            "Begin the next training with easy samples, or short ones, and let harder ones in as it goes on.",
        ),
        "distil": Part(
            "sparing.distillation.logits:Distil",
            "Train a student on the labels and on a teacher's softened outputs.",
        ),
        "drop_tokens": Part(
            "sparing.data_efficiency.token_dropping:DropTokens",
            "Let the middle layers compute a random part of the tokens in the next training, a part that grows to all.",
        ),
        "drop_zero_rows": Part(
            "sparing.compression.zero_rows:DropZeroRows",
            "Drop the embedding rows of exact zeros of a click-through model: the same answers from fewer bytes.",
        ),
        "distil_relations": Part(
            "sparing.distillation.relations:DistilRelations",
            'Pre-train a small "mae_vit" on images without labels, by how a pre-trained teacher relates their parts.',
        ),
        "distil_fair": Part(
            "sparing.distillation.fair_step:DistilFair",
            "Distil a graph network into a student that treats two groups of nodes alike, by a proxy of bias.",
        ),
        "ema": Part(
            "sparing.optimization.averaging:Ema",
            "Keep a moving average of the weights through the next training, score it beside them, and hand it on.",
        ),
        "export": Part(
            "sparing.core.export:Export",
            "Write the model for another runtime: an ONNX graph, or a ``torch.export`` file beside the model.",
        ),
        "federate": Part(
            "sparing.federated.step:Federate",
            "Let a fleet train the model: clients learn on their own data, task after task, and a server averages "
            "weights.",
        ),
        "group_ftrl": Part(
            "sparing.optimization.ftrl:GroupFtrl",
            "Train embedding tables with group-lasso FTRL, which zeroes whole rows, and everything else with FTRL.",
        ),
        "finetune": Part(
            "sparing.distillation.finetuning:FineTune",
            'Fine-tune a pre-trained "mae_vit" on labels, perhaps a few; early layers learn more slowly than later '
            "ones.",
        ),
        "leap": Part(
            "sparing.optimization.leap:Leap",
            "Multiply each parameter's learning rate in the next training by Gaussian noise of mean 1.",
        ),
        "predictive_exit": Part(
            "sparing.adaptive.predictive_exit:PredictiveExit",
            "Let easy samples leave early: exits are trained, and forecasts say where a sample will be sure enough.",
        ),
        "pretrain": Part(
            "sparing.distillation.pretraining:Pretrain",
            'Pre-train a "mae_vit" on images without looking at their labels, as a masked autoencoder.',
        ),
        "quantize": Part(
            "sparing.compression.quantization:Quantize",
            "INT8 weights and activations through ONNX Runtime, kept only when they win.",
        ),
        "rpgd": Part(
            "sparing.optimization.rpgd:Rpgd",
            "Train unit directions and scales of each layer's weights by projected gradient descent, in one phase or "
            "two.",
        ),
        "smooth_labels": Part(
            "sparing.optimization.label_smoothing:SmoothLabels",
            "Train towards labels that are a little unsure: each gives a share of its weight to all classes alike.",
        ),
        "token_lr": Part(
            "sparing.data_efficiency.tokens:TokenLr",
            "Let the learning rate of the next training follow the tokens consumed, and end it at a budget of them.",
        ),
        "stream": Part(
            "sparing.models.spiking.streaming:StreamSpikes",
            "Deploy a spiking network that keeps its state, so that frames are answered as they come.",
        ),
        "transfer": Part(
            "sparing.core.transfer:Transfer",
            "Go on with another task and its data; the model stays, but for a head that does not fit.",
        ),
        "train": Part(
            "sparing.core.training.step:Train",
            "Train the model on the task's training data with an optimizer and schedule of torch, by Lightning.",
        ),
        "weight_norm": Part(
            "sparing.optimization.weight_norm:WeightNormalization",
            "Train scale and direction of each layer's weights apart, with any optimizer, and fold them together after "
            "it.",
        ),
        "warmup_cosine": Part(
            "sparing.optimization.schedules:WarmupCosine",
            "Warm the learning rate of the next training up from near zero, then let it fall along a cosine.",
        ),
    },
    "models": {
        "alexnet": Part(
            "sparing.models.blocknet:AlexNet",
            "AlexNet for small images: two 5×5 convolutions with local response norm, three linear layers.",
        ),
        "bert": Part(
            "sparing.models.bert:Bert",
            "Transformer encoder for texts with post-norm blocks and one of five heads (Devlin et al. 2019).",
        ),
        "blocknet": Part(
            "sparing.models.blocknet:BlockNet",
            "Convolutional network of equal blocks, which gradients are matched on (Zhao et al. 2021, "
            "arXiv:2006.05929).",
        ),
        "cnn6": Part(
            "sparing.models.blocknet:SixLayerCNN",
            "Six-layer network of FedKNOW: three pairs of 3×3 convolutions, max pooling after each, two linear layers.",
        ),
        "convnet": Part(
            "sparing.models.convnet:ConvNet",
            "Plain ReLU convolutional network: stages at halving resolution, then a linear layer.",
        ),
        "dcnv2": Part(
            "sparing.models.ctr:DCNv2",
            "Deep and cross network V2, parallel: cross layers beside a perceptron (Wang et al. 2021, "
            "arXiv:2008.13535).",
        ),
        "deepfm": Part(
            "sparing.models.ctr:DeepFM",
            "A factorisation machine and a multilayer perceptron on the same embeddings (Guo et al. 2017, "
            "arXiv:1703.04247).",
        ),
        "emo": Part(
            "sparing.models.emo:EMO",
            "EMO image backbone: five stages of inverted residual mobile blocks, then a linear layer (Zhang et al. "
            "2023).",
        ),
        "fm": Part(
            "sparing.models.ctr:FactorizationMachine",
            "Factorisation machine of second order on categorical fields (Rendle 2010).",
        ),
        "fnn": Part(
            "sparing.models.ctr:FNN",
            "A perceptron on the weights and factors of a factorisation machine (Zhang, Du and Wang 2016, "
            "arXiv:1601.02376).",
        ),
        "gat": Part("sparing.models.gnn:GAT", "Graph attention network (Veličković et al. 2018, arXiv:1710.10903)."),
        "gcn": Part("sparing.models.gnn:GCN", "Graph convolutional network (Kipf and Welling 2017, arXiv:1609.02907)."),
        "gpt": Part(
            "sparing.models.gpt:Gpt",
            "Causal transformer for language modelling: pre-norm blocks, learned positions, a final norm (as GPT-2, "
            "2019).",
        ),
        "gesture_snn": Part(
            "sparing.models.spiking.gesture:GestureSNN",
            "Spiking network for event frames: convolutions, then linear layers, each with gates and neurons of its "
            "own.",
        ),
        "graph_gcn": Part(
            "sparing.models.gnn:GraphClassifier",
            "Graph convolutions, a pool over the nodes and a linear layer: a class for each graph.",
        ),
        "cpf": Part(
            "sparing.models.gnn_students:CPFStudent",
            "Label propagation mixed with a perceptron: parameterised label propagation, PLP (Yang et al. 2021, "
            "section 3.3).",
        ),
        "fair_student": Part(
            "sparing.models.gnn_students:FairStudent",
            "A student behind the mean of its proxy of bias: it takes features alone (Dong et al. 2023, RELIANT).",
        ),
        "glnn": Part(
            "sparing.models.gnn_students:GLNNStudent",
            "A perceptron on each node's own features, or on those of its neighbourhood with ``hops``.",
        ),
        "sgc_student": Part(
            "sparing.models.gnn_students:SGCStudent",
            "Three simple graph convolutions: SGC(1), ReLU, SGC(propagations), ReLU, SGC(1), dropout before the last "
            "two.",
        ),
        "lenet": Part(
            "sparing.models.blocknet:LeNet",
            "LeNet-5 with ReLU and max pooling: two 5×5 convolutions, three linear layers (LeCun et al. 1998).",
        ),
        "lr": Part(
            "sparing.models.ctr:LogisticRegression",
            "Logistic regression on categorical fields: a weight for each id, and a bias.",
        ),
        "mae_vit": Part(
            "sparing.models.mae:MAEViT",
            "Vision transformer with a class token, to be pre-trained without labels; classifies by the mean of its "
            "patches.",
        ),
        "mlp": Part("sparing.models.mlp:MLP", "Multilayer perceptron on flattened inputs."),
        "mobilenet": Part(
            "sparing.models.mobilenet:MobileNet",
            "Inverted residuals in the style of MobileNetV2: stem, four stages at halving resolution, mean, linear "
            "layer.",
        ),
        "ms_res_snn": Part(
            "sparing.models.spiking.residual:MSResSNN",
            "Residual spiking network for images: a stem, four stages that each halve the image, linear layer on mean "
            "spikes.",
        ),
        "remapped_ids": Part(
            "sparing.models.ctr:RemappedIds",
            "A model behind a list of where ids went: it takes the ids there were before rows were dropped.",
        ),
        "resnet": Part(
            "sparing.models.resnet:ResNet",
            "Residual network of basic blocks: stem, stages at halving resolution, mean over positions, linear layer.",
        ),
        "sage": Part(
            "sparing.models.gnn:GraphSAGE",
            "GraphSAGE averaging over all neighbours (Hamilton, Ying and Leskovec 2017, arXiv:1706.02216).",
        ),
        "segmenter": Part(
            "sparing.models.segmentation:SegmentationModel",
            "Segmentation: a DeepLabv3 or PSPNet decoder on a backbone, and a plain auxiliary head on the stage "
            "before.",
        ),
        "ssdlite": Part(
            "sparing.models.detection:SSDLiteDetector",
            "SSDLite: depth-wise detection heads on two stages of a backbone and on further halved maps (Sandler et "
            "al. 2018).",
        ),
        "vgg11": Part(
            "sparing.models.blocknet:VGG11",
            "VGG-11 for small images: eight 3×3 convolutions, five times max pooling, one linear layer.",
        ),
        "vit": Part(
            "sparing.models.vit:ViT",
            "Plain vision transformer: patches, learned positions, equal blocks, mean over tokens, linear layer.",
        ),
        "xdeepint": Part(
            "sparing.models.xdeepint:XDeepInt",
            "xDeepInt: bounded-order interactions of categorical fields, vector-wise and bit-wise (Yan and Li 2020).",
        ),
    },
    "predictors": {
        "early_exit": Part(
            "sparing.adaptive.exit_predictor:EarlyExitPredictor",
            "Stages and exits in ONNX Runtime, and the policy that chooses among them.",
        ),
        "engine": Part(
            "sparing.engine.predictor:EnginePredictor",
            "An :class:`~sparing.engine.runtime.Engine` on token numbers (N, T), padded behind, to the head's output.",
        ),
        "lego": Part(
            "sparing.adaptive.lego_predictor:LegoPredictor",
            "A network of ONNX graphs whose blocks are exchanged while it serves.",
        ),
        "module": Part(
            "sparing.core.predictor.module:ModulePredictor", "A torch module in evaluation mode, on arrays."
        ),
        "spiking": Part(
            "sparing.models.spiking.streaming:StreamingPredictor",
            "A spiking network in torch that answers whole recordings, or step by step with the same outputs.",
        ),
        "onnx": Part("sparing.core.predictor.onnx:OnnxPredictor", "An ONNX graph in an ONNX Runtime session."),
    },
    "operations": {
        "decode": Part(
            "sparing.data.preprocessing:Decode",
            "Paths, encoded bytes, Pillow images or arrays → uint8 images (H, W, C) of one mode.",
        ),
        "resize": Part("sparing.data.preprocessing:Resize", "Images → (height, width), bicubic with antialiasing."),
        "resize_shorter": Part(
            "sparing.data.preprocessing:ResizeShorter",
            "Images → the shorter side becomes ``size`` pixels, the longer follows in proportion (bicubic).",
        ),
        "centre_crop": Part("sparing.data.preprocessing:CentreCrop", "Images → their central (height, width) part."),
        "channels_first": Part("sparing.data.preprocessing:ChannelsFirst", "(N, H, W, C) → (N, C, H, W), contiguous."),
        "to_float": Part("sparing.data.preprocessing:ToFloat", "Integers 0…``full`` → float32 0…1."),
        "events_to_frames": Part(
            "sparing.data.events.framing:EventsToFrames",
            "Streams of events, or structured arrays with fields x, y, t and p → frames float32 (N, T, 2, x, y).",
        ),
        "encode_fields": Part(
            "sparing.data.ctr:EncodeFields",
            "Rows, mappings of a column to its value → ids, int64 (n, F), as a :class:`CTREncoder` gives them.",
        ),
        "wordpiece": Part(
            "sparing.data.wordpiece:WordPiece",
            "Texts, or pairs of texts → numbers of word pieces, int64 (N, longest), padded behind.",
        ),
        "characters": Part(
            "sparing.data.tokenizing:Characters",
            "Texts → numbers of characters, int64 (N, longest), padded behind with 0.",
        ),
        "byte_pairs": Part(
            "sparing.data.tokenizing:BytePairs",
            "Texts → numbers of byte pairs, int64 (N, longest), padded behind with 0.",
        ),
        "detect_boxes": Part(
            "sparing.data.boxes:DetectBoxes",
            "A detector's logits, offsets and anchors → boxes, scores and labels for each image, best first.",
        ),
        "label_maps": Part(
            "sparing.data.boxes:LabelMaps",
            "Logits (N, classes, h, w) → the class of each pixel, int64 (N, height, width).",
        ),
        "normalise": Part("sparing.data.preprocessing:Normalise", "(N, C, …) → (x − mean) / std for each channel."),
    },
}

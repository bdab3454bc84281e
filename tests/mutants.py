"""Mutants: single mistakes that a tired developer could make, each of which the tests must notice.

    python -m tests.mutants [NAME ...]      # all, or those whose name contains NAME; exit status 1 if one survived
    python -m tests.mutants --check         # only that every text is found exactly once, as a test of the suite does

Not part of the daily run. Each mutant is applied to a scratch copy of the repository (what git lists, as it lies in the
working tree). Its own tests run first, then, if these pass, the whole suite. A run that takes too long counts as
killed: a rank that waits for ever is noticed.
"""
import argparse
import collections
import concurrent.futures
import glob
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile

from tqdm import tqdm

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
Mutant = collections.namedtuple("Mutant", "name file text replacement tests equivalent", defaults=[None])
# name, file, a text that is there once, what to put in its place, the tests that should fail, and for a mutant that
# changes nothing, why.
# By kind: a sign, a constant, an index, a flag that is not handed on, an order of writes, a missing reduction over
# ranks, a statistic of the wrong set, a mode not restored, a default of the architecture.
TABLE = [
    # ---- encoder.py: architectures ----
    ("internvit has a final norm", "encoder.py", '"internvit": ViTConfig(final_norm=False',
     '"internvit": ViTConfig(final_norm=True', "test_architectures_are_the_published_ones"),
    ("dinov2 without layer scale", "encoder.py", "ViTConfig(size=518, layer_scale=1.0)", "ViTConfig(size=518)",
     "test_architectures_are_the_published_ones"),
    ("dinov2 at 448", "encoder.py", '"dinov2": ViTConfig(size=518, ', '"dinov2": ViTConfig(size=448, ',
     "test_architectures_are_the_published_ones"),
    ("siglip2 exact gelu", "encoder.py", '                         activation="gelu_tanh"',
     '                         activation="gelu"', "test_architectures_are_the_published_ones"),
    ("siglip2-l pixels", "encoder.py", 'num_prefix=0, activation="gelu_tanh", pixel_stats="half")',
     'num_prefix=0, activation="gelu_tanh")', "test_architectures_are_the_published_ones"),
    ("siglip2 mlp", "encoder.py", "mlp_width=4304", "mlp_width=4608", "test_architectures_are_the_published_ones"),
    ("clip epsilon", "encoder.py", "pre_norm=True, eps=1e-5", "pre_norm=True, eps=1e-6",
     "test_architectures_are_the_published_ones"),
    ("clip gelu", "encoder.py", 'activation="quick_gelu", pixel_stats', 'activation="gelu", pixel_stats',
     "test_architectures_are_the_published_ones"),
    ("clip pixels", "encoder.py", 'activation="quick_gelu", pixel_stats="openai")', 'activation="quick_gelu")',
     "test_architectures_are_the_published_ones"),
    ("heads of small", "encoder.py", "heads=6, mlp_width=1536", "heads=12, mlp_width=1536",
     "test_architectures_are_the_published_ones"),
    ("heads of tiny", "encoder.py", "heads=3, mlp_width=768", "heads=6, mlp_width=768",
     "test_architectures_are_the_published_ones"),
    ("default heads", "encoder.py", "heads: int = 16", "heads: int = 8", "test_architectures_are_the_published_ones"),
    ("default epsilon", "encoder.py", "eps: float = 1e-6", "eps: float = 1e-5",
     "test_architectures_are_the_published_ones"),
    ("imagenet deviation", "encoder.py", "(0.229, 0.224, 0.225)", "(0.225, 0.224, 0.229)",
     "test_architectures_are_the_published_ones"),
    ("openai mean", "encoder.py", "0.48145466", "0.48154466", "test_architectures_are_the_published_ones"),
    ("quick_gelu constant", "encoder.py", "1.702 * x", "1.72 * x", "test_architectures_are_the_published_ones"),
    ("tanh gelu is exact", "encoder.py", 'F.gelu(x, approximate="tanh")', "F.gelu(x)",
     "test_architectures_are_the_published_ones"),
    ("initial deviation", "encoder.py", "nn.init.normal_(m.weight, std=0.02)", "nn.init.normal_(m.weight, std=0.03)",
     "test_initial_weights_and_modes"),
    # ---- encoder.py: the network ----
    ("compiled gelu constant", "encoder.py", "0.2316419", "0.2316", "test_compiled_gelu_is_erf_gelu"),
    ("compiled gelu gradient", "encoder.py", "grad * (below + x * density)", "grad * below",
     "test_compiled_gelu_is_erf_gelu"),
    ("q and k swapped", "encoder.py", "q, k, v = self.qkv(x)", "k, v, q = self.qkv(x)",
     "test_published_layouts_equal_transformers"),
    ("wrong norm of a block", "encoder.py", "self.mlp(flat(self.norm2, x))", "self.mlp(flat(self.norm1, x))",
     "test_published_layouts_equal_transformers"),
    ("one mask for both branches", "encoder.py", "return x + keep[1] * ", "return x + keep[0] * ",
     "test_stochastic_depth_draws_two_masks"),
    ("bias escapes layer scale", "encoder.py", "scale * linear.bias)", "linear.bias)",
     "test_published_layouts_equal_transformers"),
    ("rate of stochastic depth", "encoder.py", "self.drop_path * i / max(len(self.blocks) - 1, 1)",
     "self.drop_path * (i + 1) / len(self.blocks)", "test_stochastic_depth_draws_two_masks"),
    ("kept branches are not scaled", "encoder.py", ".to(x.dtype) / (1 - rate)", ".to(x.dtype)",
     "test_stochastic_depth_draws_two_masks"),
    ("stochastic depth in eval mode", "encoder.py", "if self.training and self.drop_path:", "if self.drop_path:",
     "test_drop_path_and_activation_checkpointing"),
    ("always recomputed", "encoder.py", "recompute = self.checkpoint and", "recompute =", "test_flags_of_the_machine"),
    ("pixels of a patch transposed", "encoder.py", ".permute(0, 2, 4, 1, 3, 5).reshape(B, h * w, -1)",
     ".permute(0, 2, 4, 1, 5, 3).reshape(B, h * w, -1)", "test_sample_against_numpy"),
    ("positions h and w swapped", "encoder.py", "resize_grid(self.pos_embed[:, cls:], h, w)",
     "resize_grid(self.pos_embed[:, cls:], w, h)", "test_published_layouts_equal_transformers"),
    ("cls without its position", "encoder.py", "self.cls_token + self.pos_embed[:, :1]", "self.cls_token",
     "test_published_layouts_equal_transformers"),
    ("positions align corners", "encoder.py", "align_corners=False)", "align_corners=True)",
     "test_position_grid_resize"),
    ("positions antialiased", "encoder.py", 'size=(h, w), mode="bicubic"',
     'size=(h, w), antialias=True, mode="bicubic"', "test_position_grid_resize"),
    ("position grid transposed", "encoder.py", "grid.flatten(2).transpose(1, 2)", "grid.mT.flatten(2).transpose(1, 2)",
     "test_position_grid_resize"),
    ("latent before the norm", "encoder.py", "self.latent_down(self.vit.norm(hidden[-1][:, self.vit.num_prefix:]))",
     "self.latent_down(hidden[-1][:, self.vit.num_prefix:])", "test_latent_layout_is_row_major"),
    ("latent h and w swapped", "encoder.py", "img.shape[2] // p, img.shape[3] // p",
     "img.shape[3] // p, img.shape[2] // p", "test_latent_layout_is_row_major"),
    ("encode multiplies", "encoder.py", "- self.latent_mean) / self.latent_std",
     "- self.latent_mean) * self.latent_std", "test_file_round_trip_and_latent_statistics"),
    ("features of a layer normed", "encoder.py", "vit.norm(hidden[i]) if n is None else hidden[i]",
     "vit.norm(hidden[i])", "test_latent_layout_is_row_major"),
    ("features keep cls", "encoder.py", "[x[:, vit.num_prefix:] for x in tokens]",
     "[x[:, :x.shape[1] - vit.num_prefix] for x in tokens]", "test_latent_layout_is_row_major"),
    ("projector tanh", "encoder.py", "nn.Linear(D, D), nn.GELU()", 'nn.Linear(D, D), nn.GELU(approximate="tanh")',
     "test_released_uniflow_file"),
    ("encoder left in training mode", "encoder.py", "        return enc.eval()", "        return enc.train()",
     "test_initial_weights_and_modes"),
    ("native size forgotten", "encoder.py", 'enc.size = config["size"]', "pass", "test_initial_weights_and_modes"),
    ("statistics not loaded", "encoder.py", "        load_exactly(stats, {k:", "        dict(x={k:",
     "test_file_round_trip_and_latent_statistics"),
    ("siglip processor bicubic", "encoder.py", "resample=2)", "resample=3)", "test_export_to_hugging_face"),
    ("teacher not frozen", "encoder.py", "return vit.eval().requires_grad_(False)", "return vit.eval()",
     "test_student_equals_teacher_at_start"),
    ("teacher in training mode", "encoder.py", "return vit.eval().requires_grad_(False)",
     "return vit.requires_grad_(False)", "test_student_equals_teacher_at_start test_initial_weights_and_modes"),
    # ---- encoder.py: files ----
    ("renamed before it is on disk", "encoder.py",
     "            os.fsync(f.fileno())\n        os.replace(temporary, path)", "        os.replace(temporary, path)",
     "test_writes_are_on_disk_before_they_get_their_name"),
    ("temporary file stays", "encoder.py", "        if os.path.exists(temporary):\n            os.remove(temporary)",
     "        pass", "test_a_full_disk_loses_nothing"),
    ("scales swapped in dinov2 files", "encoder.py", "attention.output.dense layer_scale1.lambda1",
     "attention.output.dense layer_scale2.lambda1", "test_published_layouts_equal_transformers"),
    ("norms swapped in clip files", "encoder.py", "pre_layrnorm post_layernorm", "post_layernorm pre_layrnorm",
     "test_published_layouts_equal_transformers"),
    ("hash of a download unchecked", "encoder.py", "sha and sha[1])", "None)", "test_downloads"),
    ("size of a download unchecked", "encoder.py", "if size and int(size) != os.path.getsize(part):", "if False:",
     "test_downloads"),
    ("pickles on old torch", "encoder.py", ">= (2, 10)", ">= (2, 1)",
     "test_pickles_where_torch_does_not_read_them_safely"),
    ("registers before cls", "encoder.py", "prefix = [self.cls_token + self.pos_embed[:, :1], self.register_tokens]",
     "prefix = [self.register_tokens, self.cls_token + self.pos_embed[:, :1]]",
     "test_registers_equal_transformers_and_the_original_layout"),
    ("everything decays", "encoder.py", "weight_decay=weight_decay * decays", "weight_decay=weight_decay",
     "test_flags_of_the_optimizer"),
    ("tables decay", "encoder.py", "(p.ndim in (2, 4)) == decays", "(p.ndim >= 2) == decays",
     "test_flags_of_the_optimizer"),
    ("layer decay the other way", "encoder.py", "lr * layer_decay ** below.get(p, 0)",
     "lr * layer_decay ** -below.get(p, 0)", "test_parameter_groups_with_layer_decay"),
    ("patches decay as the first block", "encoder.py", '== "blocks" else -1)', '== "blocks" else 0)',
     "test_parameter_groups_with_layer_decay"),
    ("one layer too many", "encoder.py", "max(numbers) + 1)", "max(numbers) + 2)", "test_features_of_several_layers"),
    ("oldest file of the cache", "encoder.py", "max(cached, key=os.path.getmtime)", "min(cached, key=os.path.getmtime)",
     "test_published_files_and_where_they_are_looked_for"),
    ("another clip", "encoder.py", "timm/vit_large_patch14_clip_224.dfn2b/", "timm/vit_large_patch14_clip_224.openai/",
     "test_published_files_and_where_they_are_looked_for"),
    ("positions resized in half precision", "encoder.py", "grid = pos.float().reshape(", "grid = pos.reshape(",
     "test_positions_are_resized_in_fp32"),
    ("size of a file unchecked", "encoder.py", " or size % c.patch:", ":", "test_hostile_weights"),
    ("unknown tensors accepted", "encoder.py", "not (others or KNOWN_EXTRAS.match(name))", "False",
     "test_files_that_do_not_fit_are_refused"),
    ("layer -1 is normed", "encoder.py", "tokens = [vit.norm(hidden[i]) if n is None else",
     "tokens = [vit.norm(hidden[i]) if i == L - 1 else", "test_features_of_several_layers"),
    ("the size to try is turned", "encoder.py", "for s in (W, H)]", "for s in (H, W)]",
     "test_what_is_no_image_or_latent_is_refused"),
    ("save_hf in the module's precision", "encoder.py", '            x = x.detach().float()\n',
     '            x = x.detach()\n', "test_half_precision_comes_from_files_and_leaves_for_hugging_face_as_fp32"),
    ("half-precision files are refused", "encoder.py",
     "if 2 * numbers > os.path.getsize(path):  # said before anybody",
     "if 4 * numbers > os.path.getsize(path):  # said before anybody",
     "test_half_precision_comes_from_files_and_leaves_for_hugging_face_as_fp32"),
    ("too long a download passes", "encoder.py", "if size and int(size) != os.path.getsize(part):",
     "if size and int(size) > os.path.getsize(part):", "test_a_download_longer_than_declared_is_refused"),
    # ---- decoder.py ----
    ("decoder's imagenet mean", "decoder.py", "(0.485, 0.456, 0.406)", "(0.485, 0.406, 0.456)",
     "test_architectures_are_the_published_ones"),
    ("decoder heads", "decoder.py", "heads: int = 16", "heads: int = 8", "test_architectures_are_the_published_ones"),
    ("decoder blocks", "decoder.py", "gtb_depth: int = 6", "gtb_depth: int = 4",
     "test_architectures_are_the_published_ones"),
    ("flow depth", "decoder.py", "flow_depth: int = 12", "flow_depth: int = 6",
     "test_architectures_are_the_published_ones"),
    ("decoder grid", "decoder.py", "grid: int = 32", "grid: int = 16", "test_architectures_are_the_published_ones"),
    ("patchify transposed", "decoder.py", ".permute(0, 2, 4, 1, 3, 5)  # (B, h, w, C, p, p)",
     ".permute(0, 2, 4, 1, 5, 3)", "test_patchify_by_hand"),
    ("unpatchify transposed", "decoder.py", "permute(0, 3, 1, 4, 2, 5)", "permute(0, 3, 1, 5, 2, 4)",
     "test_patchify_by_hand"),
    ("a fifth of times uniform", "decoder.py", "torch.rand(shape, device=device) < 0.1",
     "torch.rand(shape, device=device) < 0.2", "test_sample_t_distribution"),
    ("steeper times", "decoder.py", "torch.sigmoid(torch.randn(", "torch.sigmoid(1.1 * torch.randn(",
     "test_sample_t_distribution"),
    ("endpoint at the image", "decoder.py", "< endpoint, torch.ones_like(t), t)", "< endpoint, torch.zeros_like(t), t)",
     "test_sample_t_distribution"),
    ("gtb epsilon of norm1", "decoder.py", "self.norm1 = nn.LayerNorm(width, 1e-5)",
     "self.norm1 = nn.LayerNorm(width, 1e-6)", "test_small_activations_show_every_epsilon"),
    ("gtb epsilon of norm2", "decoder.py", "self.norm2 = nn.LayerNorm(width, 1e-5)",
     "self.norm2 = nn.LayerNorm(width, 1e-6)", "test_small_activations_show_every_epsilon"),
    ("flow epsilon", "decoder.py", "self.norm = nn.LayerNorm(width, 1e-6)", "self.norm = nn.LayerNorm(width, 1e-5)",
     "test_small_activations_show_every_epsilon"),
    ("flow final epsilon", "decoder.py", "nn.LayerNorm(width, 1e-6, elementwise",
     "nn.LayerNorm(width, 1e-5, elementwise", "test_small_activations_show_every_epsilon"),
    ("gtb silu", "decoder.py", "F.gelu(self.fc1(self.norm2(x)))", "F.silu(self.fc1(self.norm2(x)))",
     "test_small_activations_show_every_epsilon"),
    ("gate left out", "decoder.py", "return x + gate * self.fc2(", "return x + self.fc2(",
     "test_released_uniflow_file"),
    ("shift and scale swapped", "decoder.py", "shift, scale, gate = self.modulation(y)",
     "scale, shift, gate = self.modulation(y)", "test_released_uniflow_file"),
    ("time not in thousands", "decoder.py", "sinusoid(1000 * ", "sinusoid(100 * ", "test_released_uniflow_file"),
    ("sines first", "decoder.py", "[angles.cos(), angles.sin()]", "[angles.sin(), angles.cos()]",
     "test_position_tables"),
    ("base of the frequencies", "decoder.py", "-math.log(10000)", "-math.log(1000)", "test_position_tables"),
    ("columns first", "decoder.py", "[sinusoid(rows.flatten(), width // 2), sinusoid(cols.flatten(), width // 2)]",
     "[sinusoid(cols.flatten(), width // 2), sinusoid(rows.flatten(), width // 2)]", "test_position_tables"),
    ("xy indexing", "decoder.py", 'indexing="ij"', 'indexing="xy"', "test_position_tables"),
    ("decoder positions swapped", "decoder.py", "x = x + resize_grid(self.pos_embed, h, w)",
     "x = x + resize_grid(self.pos_embed, w, h)", "test_position_tables"),
    ("second table is the first", "decoder.py", "resize_grid(self.head_pos_embed, h, w)",
     "resize_grid(self.pos_embed, h, w)", "test_position_tables test_released_uniflow_file"),
    ("decoder grid align corners", "decoder.py", "align_corners=False", "align_corners=True",
     "test_position_grid_resize test_position_tables"),
    ("x_t the other way", "decoder.py", "velocity((1 - s) * x + s * noise, t)", "velocity(s * x + (1 - s) * noise, t)",
     "test_flow_loss_closed_form"),
    ("velocity to the image", "decoder.py", "t) - (noise - x)).square()", "t) - (x - noise)).square()",
     "test_flow_loss_closed_form"),
    ("absolute error", "decoder.py", "(noise - x)).square().mean()", "(noise - x)).abs().mean()",
     "test_flow_loss_closed_form"),
    ("pixel objective at the image", "decoder.py", "t, noise = torch.ones(x.shape[:2], device=x.device)",
     "t, noise = torch.zeros(x.shape[:2], device=x.device)", "test_pixel_objective_regresses_the_pixels"),
    ("decode forgets the mean", "decoder.py", "* self.latent_std + self.latent_mean", "* self.latent_std",
     "test_file_round_trip_and_latent_statistics"),
    ("euler starts a step late", "decoder.py", "1 - i / steps", "1 - (i + 1) / steps", "test_euler_closed_form"),
    ("not clamped", "decoder.py", "+ self.mean).clamp(0, 1)", "+ self.mean)",
     "test_sample_against_numpy test_released_uniflow_file"),
    ("modulation not zero", "decoder.py", "[b.modulation for b in self.blocks] + ", "",
     "test_student_equals_teacher_at_start"),
    ("decoder left in training mode", "decoder.py", "        return dec.eval()", "        return dec.train()",
     "test_initial_weights_and_modes"),
    ("not Xavier", "decoder.py", "nn.init.xavier_uniform_(m.weight)", "nn.init.xavier_normal_(m.weight)",
     "test_initial_weights_and_modes"),
    ("dead regression", "decoder.py", "            nn.init.normal_(self.head.input_proj.bias)", "            pass",
     "test_pixel_decoder_learns_from_its_own_initialisation"),
    ("decoder always recomputed", "decoder.py", "recompute = self.checkpoint and", "recompute =",
     "test_flags_of_the_machine"),
    ("decoder positions in half precision", "decoder.py", "grid = pos.float().reshape(", "grid = pos.reshape(",
     "test_positions_are_resized_in_fp32"),
    ("velocity in the module's precision", "decoder.py", "return at_least_fp32(self._run(self.head, x_t, t, c))",
     "return self._run(self.head, x_t, t, c)", "test_precisions"),
    # ---- distill.py ----
    ("similarity for distance", "distill.py", "return 1 - torch.stack(", "return torch.stack(", "test_layer_distances"),
    ("cls not skipped", "distill.py", "[:, skip:]", "[:, 0:]",
     "test_fewer_passes_same_numbers test_training_step_drops_cls_and_draws_t_per_patch"),
    ("depth from 0", "distill.py", "torch.arange(1, L + 1, device=alpha.device)",
     "torch.arange(L, device=alpha.device)", "test_layer_weights_by_hand"),
    ("softmax of the product", "distill.py", "depth.log() + beta * alpha", "depth * beta * alpha",
     "test_layer_weights_by_hand"),
    ("progressive keeps beta", "distill.py", "beta = 0.0", "pass", "test_layer_weights_by_hand"),
    ("first layer for the final", "distill.py", "(depth == 1).float()", "(depth == depth[0]).float()",
     "test_layer_weights_by_hand"),
    ("gradient through the weights", "distill.py", "alpha = distances.detach().float()", "alpha = distances.float()",
     "test_distillation_defaults_and_gradients"),
    ("alpha per rank", "distill.py", "        dist.all_reduce(alpha)", "        pass", "test_two_ranks_equal_one"),
    ("alpha summed over ranks", "distill.py", "        alpha /= dist.get_world_size()", "        pass",
     "test_two_ranks_equal_one"),
    ("default beta", "distill.py", "def distill_loss(student, teacher, beta=2.0",
     "def distill_loss(student, teacher, beta=1.0", "test_distillation_defaults_and_gradients"),
    ("cosine in half precision", "distill.py", "F.cosine_similarity(student.float(), teacher.float(), dim=-1)",
     "F.cosine_similarity(student, teacher, dim=-1)", "test_distillation_defaults_and_gradients"),
    ("alpha is no copy", "distill.py", "alpha = distances.detach().clone()", "alpha = distances.detach()",
     "", "a rank's loss becomes the mean of all ranks', which is what is logged; the gradient reads no distance"),
    # ---- data.py ----
    ("deep pictures", "data.py", "deep >> bits - 8", "deep >> bits - 7", "test_every_kind_of_picture_becomes_rgb"),
    ("transparent is black", "data.py", 'Image.new("RGBA", img.size, "white")', 'Image.new("RGBA", img.size, "black")',
     "test_every_kind_of_picture_becomes_rgb"),
    ("jpeg decoded too small", "data.py", "img.draft(None, (2 * short, 2 * short))", "img.draft(None, (short, short))",
     "test_a_jpeg_is_decoded_no_smaller_than_its_crop_needs"),
    ("jpeg decoded too large", "data.py", "img.draft(None, (2 * short, 2 * short))",
     "img.draft(None, (3 * short, 3 * short))", "test_a_jpeg_is_decoded_no_smaller_than_its_crop_needs"),
    ("jpeg limit by the larger scale", "data.py", "self.size / self.crop_scale[0]", "self.size / self.crop_scale[1]",
     "test_a_jpeg_is_decoded_no_smaller_than_its_crop_needs"),
    ("strips cut at the start", "data.py", "int(where * (img.width - w))", "int(0 * (img.width - w))",
     "test_long_pictures_are_cut_first"),
    ("no halving at exactly twice", "data.py", "while min(img.size) >= 2 * short", "while min(img.size) > 2 * short",
     "test_shrink_is_box_halving_then_bicubic"),
    ("halved by bicubic", "data.py", "Image.Resampling.BOX", "Image.Resampling.BICUBIC",
     "test_shrink_is_box_halving_then_bicubic"),
    ("shrunk by bilinear", "data.py", "round(img.height * scale)), Image.Resampling.BICUBIC",
     "round(img.height * scale)), Image.Resampling.BILINEAR", "test_shrink_is_box_halving_then_bicubic"),
    ("center a column to the right", "data.py", "left, top = (img.width - size) // 2, ",
     "left, top = (img.width - size + 1) // 2, ", "test_center_crop_of_a_photograph_by_numpy"),
    ("center a row lower", "data.py", "(img.height - size) // 2", "(img.height - size + 1) // 2",
     "test_center_crop_of_a_photograph_by_numpy"),
    ("largest crop never drawn", "data.py", "rng.integers(low, high + 1)", "rng.integers(low, high)",
     "test_random_crops_reach_every_offset"),
    ("last column never drawn", "data.py", "rng.integers(img.width - size + 1)",
     "rng.integers(max(1, img.width - size))", "test_random_crops_reach_every_offset"),
    ("last row never drawn", "data.py", "rng.integers(img.height - size + 1)",
     "rng.integers(max(1, img.height - size))", "test_random_crops_reach_every_offset"),
    ("mirrored upside down", "data.py", "img.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if",
     "img.transpose(Image.Transpose.FLIP_TOP_BOTTOM) if", "test_random_crop_range"),
    ("never mirrored", "data.py", "if rng.random() < 0.5 else img", "if rng.random() < 0.0 else img",
     "test_random_crops_reach_every_offset"),
    ("crop without the seed", "data.py", "default_rng([self.seed, n, 1])", "default_rng([n, 1])",
     "test_augmentation_is_a_function_of_the_number"),
    ("crop by the image's number", "data.py", "default_rng([self.seed, n, 1])",
     "default_rng([self.seed, n % len(self), 1])", "test_augmentation_is_a_function_of_the_number"),
    ("every epoch the same order", "data.py", "default_rng([self.seed, epoch])", "default_rng([self.seed])",
     "test_sample_sequence_is_the_same_for_ranks_and_workers"),
    ("order without the seed", "data.py", "default_rng([self.seed, epoch])", "default_rng([epoch])",
     "test_the_order_of_an_epoch_is_the_seeds"),
    ("crop_scale not handed on", "data.py", "np.random.default_rng([self.seed, n, 1]), self.crop_scale)",
     "np.random.default_rng([self.seed, n, 1]))", "test_data_flags_of_training"),
    ("signed pictures", "data.py", "deep ^ (1 << bits - 1)", "deep ^ 0", "test_deep_and_transparent_pictures_by_hand"),
    ("white at 0", "data.py", "grey = 255 - grey", "pass", "test_deep_and_transparent_pictures_by_hand"),
    ("exif of a png lost", "data.py", "exif = blob[at + 8:at + 8 + length]", "pass",
     "test_every_kind_of_picture_becomes_rgb test_odd_metadata_cost_no_picture"),
    ("backslashes stay", "data.py", 'e.filename.replace("\\\\", "/")', "e.filename", "test_archives_by_other_tools"),
    ("hidden folders are classes", "data.py", "subfolders[:] = sorted(filter(is_visible, subfolders)",
     "subfolders[:] = sorted(subfolders", "test_folders_that_are_no_classes"),
    ("checksum ignored", "data.py", " or zlib.crc32(data) != crc", "", "test_archive_that_is_damaged_or_changes"),
    ("archive in its own order", "data.py", "found = sorted((name.encode(", "found = list((name.encode(",
     "test_folder_and_archive_agree"),
    ("replaced in evaluations", "data.py", "self.replace = train", "self.replace = True",
     "test_an_evaluation_drops_no_image"),
    ("label of the stand-in", "data.py", "-1 - i if error", "-1 - j if error", "test_hostile_pictures"),
    ("micro-batch grows", "data.py", "range(min(micro_batch, share), 0, -1)", "range(share, 0, -1)",
     "test_split_batch"),
    ("shares overlap", "data.py", "range(first + rank * share, ", "range(first + rank, ",
     "test_sample_sequence_is_the_same_for_ranks_and_workers"),
    ("drawn without the seed", "data.py", "default_rng([self.seed, n, int(self.train)])",
     "default_rng([n, int(self.train)])", "test_drawn_pictures_are_the_seeds"),
    ("drawn for evaluation as for training", "data.py", "default_rng([self.seed, n, int(self.train)])",
     "default_rng([self.seed, n, 0])", "test_drawn_pictures"),
    ("webp left out", "data.py", '".png", ".webp", ', '".png", ', "test_every_extension_is_found"),
    ("capital extensions left out", "data.py", "files)):\n            if name.lower()", "files)):\n            if name",
     "test_every_extension_is_found"),
    ("Adobe's segment stripped", "data.py", "(*range(0xE1, 0xEE), 0xEF, 0xFE)", "(*range(0xE1, 0xF0), 0xFE)",
     "test_odd_metadata_cost_no_picture"),
    ("the last EXIF of a JPEG", "data.py", "exif = exif or blob[at + 4:end]", "exif = blob[at + 4:end]",
     "test_odd_metadata_cost_no_picture"),
    ("TIFF's predictor stripped", "data.py", "284, 292, 293, 317, 320,", "284, 292, 293, 320,",
     "test_odd_metadata_cost_no_picture"),
    ("the first errno of a text", "data.py", "or [errno.EIO])[-1])", "or [errno.EIO])[0])",
     "test_only_its_own_damage_replaces_a_picture"),
    ("archives may take every descriptor", "data.py",
     "if limit != resource.RLIM_INFINITY and archives + SPARE_FILES > limit:",
     "if limit != resource.RLIM_INFINITY and archives > limit:", "test_too_many_archives_are_refused"),
    # ---- eval.py: metrics ----
    ("psnr of amplitudes", "eval.py", "return -10 * (a.double()", "return -20 * (a.double()", "test_psnr_closed_form"),
    ("ssim sigma", "eval.py", "- 5) / 1.5)", "- 5) / 1.6)", "test_ssim_equals_scikit_image"),
    ("ssim constant", "eval.py", "(0.03 * data_range) ** 2", "(0.02 * data_range) ** 2",
     "test_ssim_equals_scikit_image"),
    ("ssim covariance", "eval.py", "49 / 48", "1.0", "test_ssim_equals_scikit_image"),
    ("error magnified twice", "eval.py", "(4 * (img - rec).abs())", "(2 * (img - rec).abs())",
     "test_sample_against_numpy"),
    ("noise without the seed", "eval.py", "SeedSequence([seed, n])", "SeedSequence([0, n])",
     "test_noise_depends_on_seed_and_image_number_only"),
    ("covariance of the population", "eval.py", "self.scatter / (self.count - 1)", "self.scatter / self.count",
     "test_streamed_moments"),
    ("merge without the means", "eval.py", "(self.count * count / total)", "0", "test_streamed_moments"),
    ("least components", "eval.py", "[:, -components:]", "[:, :components]", "test_patch_pca"),
    ("one cross term", "eval.py", "- 2 * cross)", "- cross)", "test_frechet_distance"),
    ("entropy sign", "eval.py", "/ sums[:, 0] - torch.xlogy(p, p)", "/ sums[:, 0] + torch.xlogy(p, p)",
     "test_inception_score"),
    ("sample deviation of IS", "eval.py", "score.std(correction=0)", "score.std()", "test_inception_score"),
    ("inception epsilon", "eval.py", "eps=0.001", "eps=1e-5", "test_inception_equals_plain_functions"),
    ("inception counts padding", "eval.py", "count_include_pad=False", "count_include_pad=True",
     "test_inception_equals_plain_functions"),
    ("inception averages at the end", "eval.py", '"Mixed_7c": (maximum, mixed_7)', '"Mixed_7c": (average, mixed_7)',
     "test_inception_equals_plain_functions"),
    ("inception input", "eval.py", "x = 2 * x - 1", "x = 2 * x", "test_inception_equals_plain_functions"),
    ("inception logits with bias", "eval.py", "return pool, pool @ fc.weight.T", "return pool, fc(pool)",
     "test_inception_equals_plain_functions"),
    # ---- eval.py: probe and neighbours ----
    ("standardised by the test set", "eval.py", "mean, std, classes = x.mean(0), x.std(0) + 1e-6",
     "mean, std, classes = test_x.mean(0), test_x.std(0) + 1e-6", "test_the_probe_is_fitted_on_fit_alone"),
    ("each set by itself", "eval.py", "F.pad((part - mean) / std, (0, 1), value=1.0)",
     "F.pad((part - part.mean(0)) / std, (0, 1), value=1.0)", "test_the_probe_is_fitted_on_fit_alone"),
    ("rate chosen on the test set", "eval.py", "accuracy(heads[i], x[held], y[held])",
     "accuracy(heads[i], test_x, test_y)", "test_the_probe_is_fitted_on_fit_alone"),
    ("rate chosen on what was learned", "eval.py", "accuracy(heads[i], x[held], y[held])",
     "accuracy(heads[i], x[kept], y[kept])", "test_the_probe_is_fitted_on_fit_alone"),
    ("held back and learned", "eval.py", "order[:len(x) // 10], order[len(x) // 10:]", "order[:len(x) // 10], order",
     "test_the_probe_is_fitted_on_fit_alone"),
    ("momentum of the probe", "eval.py", "velocity = 0.9 * velocity", "velocity = 0.8 * velocity",
     "test_the_probe_is_sgd_with_momentum_and_a_cosine_schedule"),
    ("schedule of the probe", "eval.py", "0.5 + 0.5 * math.cos(", "0.5 - 0.5 * math.cos(",
     "test_the_probe_is_sgd_with_momentum_and_a_cosine_schedule"),
    ("temperature of the votes", "eval.py", "temperature=0.07", "temperature=0.1",
     "test_votes_of_the_nearest_neighbours"),
    ("ten neighbours", "eval.py", "k=20", "k=10", "test_votes_of_the_nearest_neighbours"),
    ("votes by distance", "eval.py", "F.normalize(test_x[i:i + 512].float(), dim=1)", "test_x[i:i + 512].float()",
     "test_votes_of_the_nearest_neighbours"),
    ("cls pooled", "eval.py", "vit.norm(hidden[who][-1])[:, P:].mean(1)", "vit.norm(hidden[who][-1]).mean(1)",
     "test_the_probe_sees_the_right_tokens_and_labels"),
    ("probe before the norm", "eval.py", "vit.norm(hidden[who][-1])[:, P:]", "hidden[who][-1][:, P:]",
     "test_the_probe_sees_the_right_tokens_and_labels"),
    ("wrong layer", "eval.py", "hidden[who][-2][:, P:]", "hidden[who][-3][:, P:]",
     "test_the_probe_sees_the_right_tokens_and_labels"),
    ("labels of another set", "eval.py", "device=job.device)[test_y]", "device=job.device)[test_y] * 0 + test_y",
     "test_the_probe_sees_the_right_tokens_and_labels"),
    ("cosine of --fit", "eval.py", "if data is inputs:", "if data is fit:",
     "test_the_probe_sees_the_right_tokens_and_labels"),
    ("cosine with cls", "eval.py", "F.cosine_similarity(s[:, P:].float(), t[:, P:].float(), dim=-1)",
     "F.cosine_similarity(s.float(), t.float(), dim=-1)", "test_the_probe_sees_the_right_tokens_and_labels"),
    ("seed not for the probe", "eval.py", "linear_probe(*one, job.args.seed)", "linear_probe(*one)",
     "test_the_probe_sees_the_right_tokens_and_labels"),
    ("named teacher ignored", "eval.py", "named = args.teacher or info", "named = info",
     "test_the_probes_teacher_is_the_one_named"),
    # ---- eval.py: reconstruction and the rest ----
    ("resized by bilinear", "eval.py", "(size, size), Image.Resampling.BICUBIC",
     "(size, size), Image.Resampling.BILINEAR", "test_flags_of_eval"),
    ("eval steps not handed on", "eval.py", "args.steps, noise).float()", "1, noise).float()", "test_flags_of_eval"),
    ("eval seed not handed on", "eval.py", "3 * p * p, args.seed)", "3 * p * p)", "test_flags_of_eval"),
    ("data range of ssim_paper", "eval.py", 'ssim(ref, rec, "uniform", 2.0)', 'ssim(ref, rec, "uniform", 1.0)',
     "test_flags_of_eval"),
    ("bf16 ignored", "eval.py", "enabled=args.bf16)", "enabled=False)", "test_flags_of_eval"),
    ("report is not rounded", "eval.py", "rec = (rec * 255).round().to(torch.uint8).cpu()",
     "rec = (rec * 255).to(torch.uint8).cpu()", "test_flags_of_eval"),
    ("pca fitted on --data", "eval.py", 'job.images("fit PCA", fit)', 'job.images("fit PCA", inputs)',
     "test_eval_measures_the_pca_of_fit"),
    ("scores of one rank", "eval.py", "sum(job.gather(x)) / len(inputs) for row", "x / len(inputs) for row",
     "test_figures_do_not_depend_on_batch_or_ranks"),
    ("moments of one rank", "eval.py", "self.gather((moments.count, moments.mean.cpu(), moments.scatter.cpu()))",
     "[(moments.count, moments.mean.cpu(), moments.scatter.cpu())]",
     "test_figures_do_not_depend_on_batch_or_ranks test_latent_statistics_and_saved_latents"),
    ("columns of the probe's table", "eval.py", 'for kind in ("linear", "knn") for who in ("student", "teacher")]',
     'for who in ("student", "teacher") for kind in ("linear", "knn")]', "test_the_probes_teacher_is_the_one_named"),
    ("epochs of the probe", "eval.py", "epochs=40, batch", "epochs=10, batch",
     "test_the_probe_is_sgd_with_momentum_and_a_cosine_schedule"),
    ("eval workers ignored", "eval.py", "num_workers=self.args.workers,", "num_workers=0,", "test_flags_of_eval"),
    ("default batch of eval", "eval.py", '"--batch_size", type=int, default=32', '"--batch_size", type=int, default=64',
     "test_defaults_and_recipes_by_hand"),
    ("splits in file order", "eval.py", "torch.from_numpy(np.random.default_rng(n).permutation(n))", "torch.arange(n)",
     "test_inception_score_of_any_order"),
    ("the first 512", "eval.py", "[i * n // count for i in range(count)]", "list(range(count))",
     "test_validation_strides_through_the_whole_set"),
    ("perfect pictures are infinite", "eval.py", "decibels.clamp(max=PERFECT)", "decibels",
     "test_perfect_pictures_count_with_100_dB"),
    ("perfect in validation", "eval.py", "psnr(img, rec).clamp(max=PERFECT)", "psnr(img, rec)",
     "test_data_flags_of_training"),
    ("fid always at 256", "eval.py", 'None if args.resolution == "native" else 256', "256",
     "test_fid_between_anything"),
    ("fid never at 256", "eval.py", 'None if args.resolution == "native" else 256', "None",
     "test_fid_statistics_by_numpy test_fid_between_anything"),
    ("statistics of B saved", "eval.py", "map(np.asarray, found[0])", "map(np.asarray, found[-1])",
     "test_fid_statistics_by_numpy"),
    ("sample deviation of latents", "eval.py", "latents.scatter.diagonal() / latents.count)",
     "latents.scatter.diagonal() / (latents.count - 1))", "test_latent_statistics_and_saved_latents"),
    ("validate without eval mode", "eval.py", "encoder.eval(), decoder.eval()", "pass",
     "test_validation_sees_whole_networks"),
    ("validate stays in eval mode", "eval.py", "encoder.train(), decoder.train()", "pass",
     "test_validation_sees_whole_networks"),
    ("validation of one rank", "eval.py", "        dist.all_reduce(total)", "        pass", "test_what_ranks_share"),
    ("validation not rounded", "eval.py", "rec = round_uint8(decoder.decode(z, noise=noise))",
     "rec = decoder.decode(z, noise=noise)", "test_data_flags_of_training"),
    ("validation's times reversed", "eval.py", "t = (k + torch.rand(", "t = (9 - k + torch.rand(",
     "test_validation_during_training"),
    ("ranks without images", "eval.py", '            if count:\n                whole.merge',
     '            if True:\n                whole.merge',
     "", "rank 0 always has an image, and to merge none changes no bit"),
    ("the larger set warns", "eval.py", "warn_of_few(min(counts, default=2048))",
     "warn_of_few(max(counts, default=2048))", "test_fid_between_anything"),
    ("other pickles from torch 2.6 on", "eval.py", "(2, 10) and not sha256(path)", "(2, 6) and not sha256(path)",
     "test_inceptions_where_torch_does_not_read_pickles_safely"),
    ("a stale mount is a bug", "eval.py", "EAGAIN EBUSY ESTALE ENOLCK", "EAGAIN EBUSY ENOLCK",
     "test_a_bug_is_no_users_error"),
    ("Ctrl-C of eval is an error", "eval.py", '        sys.exit(130)\n', '        sys.exit(1)\n',
     "test_a_bug_shows_its_traceback"),
    ("teacher_weights of the file for another teacher", "eval.py",
     'args.teacher_weights or (None if args.teacher else info.get("teacher_weights"))',
     'args.teacher_weights or info.get("teacher_weights")', "test_the_probes_teacher_is_the_one_named"),
    # ---- train.py: flags ----
    ("paper's rate", "train.py", "PAPER = dict(lr=2e-4", "PAPER = dict(lr=1e-4", "test_recipes_are_the_papers"),
    ("dinov2 trained at 448", "train.py", '"dinov2": dict(PAPER, size=378)', '"dinov2": dict(PAPER, size=448)',
     "test_recipes_are_the_papers"),
    ("laptop without endpoint", "train.py", "steps=400, endpoint=0.5", "steps=400, endpoint=0.0",
     "test_recipes_are_the_papers"),
    ("data's seed not handed on", "train.py", "args.size, True, args.seed, tuple", "args.size, True, 0, tuple",
     "test_data_flags_of_training"),
    ("data's crop_scale not handed on", "train.py", "args.seed, tuple(args.crop_scale))", "args.seed)",
     "test_data_flags_of_training"),
    ("drawn without --seed", "train.py", "ProceduralDataset(args.size, True, args.seed)",
     "ProceduralDataset(args.size, True)", "test_data_flags_of_training"),
    ("--val ignored", "train.py", "ImageDataset(args.val or args.data", "ImageDataset(args.data",
     "test_data_flags_of_training"),
    ("decoder's heads by default", "train.py", "width=c.width, heads=c.heads, ", "width=c.width, ",
     "test_training_builds_the_decoder_of_its_teacher"),
    ("decoder's pixels by default", "train.py", ", pixel_stats=c.pixel_stats)", ")",
     "test_training_builds_the_decoder_of_its_teacher"),
    ("encoder's projector by default", "train.py", "args.latent_dim, args.projector)", "args.latent_dim)",
     "test_flags_of_the_networks"),
    ("decoder's grid by default", "train.py", "grid=args.size // c.patch, ", "",
     "test_training_builds_the_decoder_of_its_teacher"),
    ("final norm trained", "train.py", "encoder.vit.norm.requires_grad_(False)", "pass",
     "test_student_equals_teacher_at_start"),
    ("encoder never frozen", "train.py", "requires_grad_(not args.freeze_encoder)", "requires_grad_(True)",
     "test_flags_of_the_networks"),
    ("drop_path not handed on", "train.py", "encoder.vit.drop_path = args.drop_path", "pass",
     "test_flags_of_the_networks"),
    ("decoder not recomputed", "train.py", "encoder.vit.checkpoint = decoder.checkpoint = args.checkpoint_activations",
     "encoder.vit.checkpoint = args.checkpoint_activations", "test_flags_of_the_machine"),
    ("statistics of --init kept", "train.py", "module.latent_std.fill_(1)", "pass",
     "test_latent_statistics_and_saved_latents"),
    ("cls distilled", "train.py", "args.beta, args.strategy, P)", "args.beta, args.strategy)",
     "test_training_step_drops_cls_and_draws_t_per_patch"),
    ("strategy not handed on", "train.py", "h_teacher, args.beta, args.strategy, P)", "h_teacher, args.beta, skip=P)",
     "test_options_of_the_method"),
    ("beta not handed on", "train.py", "h_teacher, args.beta, args.strategy, P)", "h_teacher, 2.0, args.strategy, P)",
     "test_options_of_the_method"),
    ("endpoint not handed on", "train.py", ", args.endpoint, img.device)", ", 0.0, img.device)",
     "test_flags_of_the_networks"),
    ("lambda_d ignored", "train.py", "args.lambda_d * loss_dist + args.lambda_f * loss_flow  # eq. 6",
     "loss_dist + args.lambda_f * loss_flow  # eq. 6", "test_losses_and_clipping"),
    ("lambda_f ignored", "train.py", "args.lambda_d * loss_dist + args.lambda_f * loss_flow  # eq. 6",
     "args.lambda_d * loss_dist + loss_flow  # eq. 6", "test_losses_and_clipping"),
    ("log without lambda_d", "train.py", "loss=args.lambda_d * loss_dist + ", "loss=loss_dist + ",
     "test_losses_and_clipping"),
    ("accumulation sums", "train.py", "(loss / accumulation).backward()", "loss.backward()",
     "test_losses_and_clipping"),
    ("log of accumulation sums", "train.py", "m == s.accumulation - 1) / s.accumulation", "m == s.accumulation - 1)",
     "test_losses_and_clipping"),
    ("clip 0 clips to 0", "train.py", "args.clip or math.inf", "args.clip", "test_losses_and_clipping"),
    ("clip not handed on", "train.py", "args.clip or math.inf", "1.0", "test_losses_and_clipping"),
    ("infinite steps are taken", "train.py", "optimizer.found_inf = ", "found_inf = ", "test_numbers_that_go_wrong"),
    ("usual momentum", "train.py", "betas=(args.beta1, args.beta2)", "betas=(0.5, args.beta2)",
     "test_flags_of_the_optimizer"),
    ("second moment", "train.py", "betas=(args.beta1, args.beta2)", "betas=(args.beta1, 0.95)",
     "test_flags_of_the_optimizer"),
    ("encoder_lr_scale ignored", "train.py", "args.lr * scale, args.weight_decay)", "args.lr, args.weight_decay)",
     "test_flags_of_the_optimizer"),
    ("weight_decay not handed on", "train.py", "args.lr * scale, args.weight_decay)", "args.lr * scale)",
     "test_flags_of_the_optimizer"),
    ("decay over the whole run", "train.py", "max(1.0, args.lr_decay * args.steps)", "max(1.0, args.steps)",
     "test_learning_rate_decay"),
    ("paper's momentum", "train.py", '"--beta1", type=float, default=0.5', '"--beta1", type=float, default=0.9',
     "test_defaults_and_recipes_by_hand test_optimizer_sees_clipped_gradients_and_this_runs_settings"),
    ("warm-up from 0", "train.py", "(step + 1) / max(1, args.warmup)", "step / max(1, args.warmup)",
     "test_flags_of_the_optimizer"),
    ("cosine the other way", "train.py", "(1 - math.cos(math.pi * left)) / 2", "(1 + math.cos(math.pi * left)) / 2",
     "test_flags_of_the_optimizer"),
    ("average of the weights", "train.py", "1 - min(decay, (step + 1) / (step + 10))",
     "min(decay, (step + 1) / (step + 10))", "test_flags_of_the_optimizer"),
    ("averages not exported", "train.py", 'weights = state.get("averaged", state)', "weights = state",
     "test_flags_of_the_optimizer"),
    ("averages not restored", "train.py", 'state.get("averaged", state)[part]', "state[part]",
     "test_flags_of_the_optimizer"),
    ("epochs are steps", "train.py", "args.epochs * len(s.data) // args.batch_size", "args.epochs",
     "test_flags_of_the_output"),
    ("eval and save swapped", "train.py", "due(args.log_every), due(args.eval_every)",
     "due(args.log_every), due(args.save_every)", "test_flags_of_the_output"),
    ("log never reset", "train.py", "        now.sums = torch.zeros_like(now.sums)", "        pass",
     "test_flags_of_the_output"),
    ("workers not handed on", "train.py", "num_workers=args.workers, collate_fn",
     "num_workers=0 * args.workers, collate_fn", "test_flags_of_the_machine"),
    ("validation's seed", "train.py", "s.micro_batch, args.seed, s.autocast", "s.micro_batch, 0, s.autocast",
     "test_validation_sees_whole_networks"),
    ("flops of the step", "train.py", "3 * tokenizer_flops", "2 * tokenizer_flops",
     "test_flops_against_the_closed_form"),
    ("val's names not compared", "train.py", "for x, paths in ((s.data, args.data), (s.val, args.val)))",
     "for x, paths in ((s.data, args.data), (s.val, None)))", "test_data_that_moved_resume"),
    ("default clip", "train.py", '"--clip", type=float, default=1.0', '"--clip", type=float, default=0.0',
     "test_defaults_and_recipes_by_hand"),
    ("default crops", "train.py", "default=[0.8, 1.0]", "default=[0.7, 1.0]", "test_defaults_and_recipes_by_hand"),
    ("rate of small", "train.py", '"small": dict(OURS, lr=5e-4', '"small": dict(OURS, lr=1e-3',
     "test_defaults_and_recipes_by_hand"),
    ("micro-batch of clip", "train.py", "size=224, micro_batch=128", "size=224, micro_batch=64",
     "test_defaults_and_recipes_by_hand"),
    ("printed weights are alphas", "train.py", "w {three(x['weight'])}", "w {three(x['alpha'])}",
     "test_flags_of_the_output"),
    ("first flow of the first batch", "eval.py", "* len(numbers)", "* len(img)",
     "test_what_ranks_share test_validation_during_training"),
    ("initialised without the seed", "train.py", "torch.manual_seed(args.seed)", "torch.manual_seed(0)",
     "test_data_flags_of_training"),
    ("speed of one step", "train.py", "(time.time() - tick) / timed", "(time.time() - tick)",
     "test_flags_of_the_output"),
    ("evaluations count as training", "train.py", "        if logging or evaluating or saving:\n",
     "        if logging:\n", "test_flags_of_the_output"),
    ("names of the pictures not compared", "train.py", "hashlib.sha256(x.names)", "hashlib.sha256(b'')",
     "test_a_resume_compares_every_argument"),
    # ---- train.py: ranks ----
    ("noise without the rank", "train.py", "seed_step(args.seed, now.step, m, run.rank)",
     "seed_step(args.seed, now.step, m)", "test_what_ranks_share"),
    ("noise without the micro-step", "train.py", "seed_step(args.seed, now.step, m, run.rank)",
     "seed_step(args.seed, now.step, 0, run.rank)", "test_every_micro_step_draws_its_own_noise"),
    ("noise without the step", "train.py", "seed_step(args.seed, now.step, m, run.rank)",
     "seed_step(args.seed, 0, m, run.rank)", "test_every_micro_step_draws_its_own_noise"),
    ("noise without the seed of the run", "train.py", "seed_step(args.seed, now.step, m, run.rank)",
     "seed_step(0, now.step, m, run.rank)", "test_every_micro_step_draws_its_own_noise"),
    ("statistics of one rank", "train.py", "        dist.all_reduce(stats)  # alpha", "        pass  # alpha",
     "test_ranks_and_accumulation_give_one_run"),
    ("news of one rank", "tools/run.py", "            dist.all_reduce(total, group=self.control)", "            pass",
     "test_what_ranks_share"),
    ("bad pictures of one rank", "tools/run.py", "return set().union(*everyones)", "return items",
     "test_what_ranks_share"),
    ("not saved when interrupted", "train.py", "if saving or interrupted:", "if saving:",
     "test_what_ranks_share test_signals_save_and_stop"),
    # ---- train.py: what a resume restores, and orders of writes ----
    ("samples not restored", "train.py", "vars(now).update({k: state[k] for k in vars(now)})",
     'vars(now).update({k: state[k] for k in vars(now)}, samples=state["step"] * args.batch_size)',
     "test_a_resume_restores_every_field"),
    ("bad pictures not restored", "train.py", "vars(now).update({k: state[k] for k in vars(now)})",
     "vars(now).update({k: state[k] for k in vars(now)}, bad=[])", "test_a_resume_restores_every_field"),
    ("sums not restored", "train.py", "vars(now).update({k: state[k] for k in vars(now)})",
     "vars(now).update({k: state[k] for k in vars(now)}, sums=now.sums)", "test_a_resume_restores_every_field"),
    ("faults not restored", "train.py", "vars(now).update({k: state[k] for k in vars(now)})",
     "vars(now).update({k: state[k] for k in vars(now)}, faults=now.faults)", "test_a_resume_restores_every_field"),
    ("a new id", "train.py", "vars(now).update({k: state[k] for k in vars(now)})",
     "vars(now).update({k: state[k] for k in vars(now)}, id=now.id)", "test_a_resume_restores_every_field"),
    ("moments not restored", "tools/run.py", "        optimizer.load_state_dict(state)", "        pass",
     "test_resume_is_exact"),
    ("decoder not restored", "train.py", "for part, module in s.models.items():\n            load_exactly(",
     'for part, module in [("encoder", s.encoder)]:\n            load_exactly(', "test_resume_is_exact"),
    ("settings of the checkpoint", "tools/run.py", "        group.update(settings)", "        pass",
     "test_a_resume_restores_every_field"),
    ("seed may differ", "train.py", 'MAY_DIFFER = set("data val out ', 'MAY_DIFFER = set("data val out seed ',
     "test_a_resume_compares_every_argument"),
    ("micro_batch may not differ", "train.py", "workers micro_batch compile", "workers compile",
     "test_a_resume_compares_every_argument"),
    ("faults in a row never end", "train.py", "(now.faults[1] + 1) * skipped", "now.faults[1] + skipped",
     "test_a_resume_restores_every_field"),
    ("model before the checkpoint", "train.py",
     "        write_atomically(path, lambda f: torch.save(state, f))\n"
     '        export(state, s.run.path("model.safetensors"))',
     '        export(state, s.run.path("model.safetensors"))\n'
     "        write_atomically(path, lambda f: torch.save(state, f))", "test_flags_of_the_output"),
    ("model of another step stays", "train.py", "            export(state, model_path)", "            pass",
     "test_a_kill_between_any_two_writes_changes_nothing"),
    ("log keeps the future", "tools/run.py", '["step"] <= step', '["step"] <= step + 99',
     "test_a_kill_between_any_two_writes_changes_nothing"),
    ("log loses the last line", "tools/run.py", '["step"] <= step', '["step"] < step', "test_resume_is_exact"),
    ("kept copy of every step", "train.py", "if every and s.now.step % every == 0:", "if every:",
     "test_flags_of_the_output"),
    ("deviation of the mean", "train.py", 'latent_std=state["latent_std"])', 'latent_std=state["latent_mean"])',
     "test_file_round_trip_and_latent_statistics"),
    ("skipped steps in the mean", "train.py", "torch.where(skipped, 0, row)", "torch.nan_to_num(row, 0, 0, 0)",
     "test_a_resume_restores_every_field"),
    ("--init keeps the decoder's statistics", "train.py",
     '        for module in (encoder, decoder):\n            module.latent_mean.zero_()',
     '        for module in (encoder,):\n            module.latent_mean.zero_()',
     "test_latent_statistics_and_saved_latents"),
    ("an evaluation that fails loses the steps", "train.py",
     '    except Exception:\n        save(s)\n        raise\n', '    except Exception:\n        raise\n',
     "test_training_tells_a_bug_from_a_users_error"),
    ("small without a GPU takes the GPU's recipe", "train.py", 'if args.teacher in ("small", "tiny") and not',
     'if args.teacher == "tiny" and not', "test_defaults_and_recipes_by_hand"),
    # ---- sample.py ----
    ("padded above and left", "sample.py", "(0, -W % p, 0, -H % p)", "(-W % p, 0, -H % p, 0)",
     "test_sample_against_numpy"),
    ("padding mirrors", "sample.py", 'mode="replicate"', 'mode="reflect"',
     "test_sample_against_numpy test_sample_decodes_what_it_saved"),
    ("long side resized", "sample.py", "round(s * short / min(img.size))", "round(s * short / max(img.size))",
     "test_sample_against_numpy"),
    ("resized bilinear", "sample.py", "img.resize((W, H), Image.Resampling.BICUBIC)",
     "img.resize((W, H), Image.Resampling.BILINEAR)", "test_sample_against_numpy"),
    ("sample seed ignored", "sample.py", "3 * p * p, seed)", "3 * p * p, 0)", "test_sample_against_numpy"),
    ("sample steps ignored", "sample.py", "dec.decode(z, steps, noise.expand", "dec.decode(z, 1, noise.expand",
     "test_sample_decodes_what_it_saved"),
    ("truncated instead of rounded", "sample.py", "(255 * rec).round().to(torch.uint8).cpu()",
     "(255 * rec).to(torch.uint8).cpu()", "test_sample_against_numpy"),
    ("skipped pictures are no failure", "sample.py", "return 1 if skipped else 0", "return 0",
     "test_bad_input_is_one_line_and_status_2"),
    ("least components as colours", "sample.py", "[:, -3:].flip(1)", "[:, :3]",
     "test_sample_features_are_principal_components"),
    ("components in the student's frame", "sample.py", "x - tokens[-1].mean(0) for x", "x - x.mean(0) for x",
     "test_sample_features_are_principal_components"),
    ("results among the data", "sample.py", "if not within(path + ending, folder):", "if True:",
     "test_results_are_not_put_into_the_data"),
    ("compared although alone", "sample.py", "alone = latent or args.reconstruction or", "alone = latent or",
     "test_reconstructions_alone"),
    ("latents of other weights", "sample.py", "if theirs != digest:", "if False:", "test_sample_decodes_what_it_saved"),
    ("animations loop once more", "sample.py", '{"loop": img.info["loop"]}', '{"loop": img.info["loop"] + 1}',
     "test_sample_animations"),
    ("psnr of the first frame", "sample.py", "for a, b in zip(x, rec)) / T", "for a, b in zip(x, rec)) / 1",
     "test_sample_animations"),
    ("a GIF that plays once plays for ever", "sample.py", 'kind = {"loop": 1, **kind', 'kind = {"loop": 0, **kind',
     "test_reconstructions_alone"),
    ("the teacher is downloaded for a picture", "sample.py", "given and str(given), offline=True)",
     "given and str(given))", "test_sample_features_are_principal_components"),
    ("fast forgets the steps", "sample.py", "torch.no_grad()(lambda latent: dec.decode(latent, steps))",
     "torch.no_grad()(lambda latent: dec.decode(latent))", "test_fast_takes_as_many_steps"),
    ("the PSNR of an animation is its first frame's", "sample.py",
     "mean = sum(psnr(a[None] / 255, b[None] / 255).item() for a, b in zip(x, rec)) / T",
     "mean = psnr(x[:1] / 255, rec[:1] / 255).item()", "test_the_psnr_of_an_animation_is_the_mean_of_its_frames"),
    # ---- tools/run.py: names, signals, checkpoints ----
    ("the third run overwrites the first's", "tools/run.py", "                while os.path.exists(aside):",
     "                if os.path.exists(aside):", "test_a_run_without_a_checkpoint_sets_all_others_aside"),
    ("any half-written file is removed", "tools/run.py",
     " and time.time() - os.path.getmtime(self.path(name)) > 600:", ":",
     "test_half_written_files_of_a_killed_run_alone_are_removed"),
    ("two SIGTERM end the run at once", "tools/run.py", "if INTERRUPTS.count(signal.SIGINT) > 1:",
     "if len(INTERRUPTS) > 1:", "test_a_second_signal"),
    ("a disk's trouble is a damaged checkpoint", "tools/run.py", "        if user_message(e):  # but",
     "        if False:  # but", "test_a_disk_that_fails_is_no_damaged_checkpoint"),
    ("bad_images.txt stays", "tools/run.py", 'for name in ("log.jsonl", "bad_images.txt", "model',
     'for name in ("log.jsonl", "model', "test_a_run_without_a_checkpoint_sets_all_others_aside"),
]
MUTANTS = [Mutant(*row) for row in TABLE]


def wrong_entries(root):
    """What is not true in the table: a text that is not there exactly once, a name used twice, a test that there is
    not."""
    tests = "".join(open(path).read() for path in (os.path.join(root, "test_all.py"),
                                                   *glob.glob(os.path.join(root, "tests", "test_*.py"))))
    sources, wrong = {m.file: open(os.path.join(root, m.file)).read() for m in MUTANTS}, []
    for m in MUTANTS:
        count = sources[m.file].count(m.text)
        if count != 1:
            wrong.append(f"{m.name}: its text is {count} times in {m.file}, expected once: {m.text!r}")
        wrong += [f"{m.name}: there is no test {test}" for test in m.tests.split() if f"def {test}(" not in tests]
        if m.text == m.replacement or not m.tests and not m.equivalent:
            wrong.append(f"{m.name}: it changes nothing, or names no test")
    names = collections.Counter(m.name for m in MUTANTS)
    return wrong + [f"{name}: {n} mutants have this name" for name, n in names.items() if n > 1]


def scratch_copy(folder):
    listed = subprocess.run(["git", "-C", HERE, "ls-files", "-co", "--exclude-standard"], capture_output=True,
                            text=True, check=True).stdout
    for name in filter(lambda name: os.path.isfile(os.path.join(HERE, name)), listed.splitlines()):
        os.makedirs(os.path.dirname(os.path.join(folder, name)), exist_ok=True)
        shutil.copy(os.path.join(HERE, name), os.path.join(folder, name))
    return folder


def heed_signals():
    """A command that a shell started in the background ignores SIGINT, and under nohup SIGHUP; tests send both."""
    for number in signal.SIGINT, signal.SIGHUP:
        signal.signal(number, signal.SIG_DFL)


def run_tests(folder, names, seconds):
    """Whether the tests pass in a copy, within that time. What they started is ended with them, known by a mark in its
    environment."""
    mark = f"UNIFLOW_MUTANT={folder}"
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **dict([mark.split("=", 1)])}
    with open(folder + ".txt", "w") as said:
        child = subprocess.Popen([sys.executable, "test_all.py", *names], cwd=folder, env=env, stdin=subprocess.DEVNULL,
                                 stdout=said, stderr=said,
                                 start_new_session=True, preexec_fn=heed_signals)
    try:
        return child.wait(seconds) == 0
    except subprocess.TimeoutExpired:
        return False
    finally:
        child.kill()
        child.wait()
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                if mark.encode() in open(f"/proc/{pid}/environ", "rb").read().split(b"\0"):
                    os.kill(int(pid), signal.SIGKILL)
            except OSError:  # it has ended, or is another user's
                pass


def verdict(mutant, folder, quick):
    """"killed", "SURVIVED" or "equivalent", of the copy in `folder`, which is as it was afterwards, and why."""
    if mutant.equivalent:
        return "equivalent", mutant.equivalent
    path = os.path.join(folder, mutant.file)
    original = open(path).read()
    try:
        open(path, "w").write(original.replace(mutant.text, mutant.replacement))
        if not run_tests(folder, mutant.tests.split(), 150):
            return "killed", ""
        if quick or run_tests(folder, [], 1800):
            return "SURVIVED", ""
        others = [line.split()[1] for line in open(folder + ".txt") if line.startswith("FAILED ")]
        return "killed", f"not by {mutant.tests}, but by {' '.join(others) or 'time'}"
    finally:
        open(path, "w").write(original)


def main(argv=None):
    ap = argparse.ArgumentParser(description="Apply each mutant to a copy of the repository: do the tests notice it?")
    ap.add_argument("names", nargs="*", metavar="NAME", help="part of a mutant's name, or a file [all]")
    ap.add_argument("--jobs", type=int, default=1, help="mutants at a time [%(default)s]")
    ap.add_argument("--quick", action="store_true",
                    help="only the tests that a mutant names: neither the suite where these pass, nor first the "
        "tests without a mutant")
    ap.add_argument("--check", action="store_true", help="only check that the table is true")
    args = ap.parse_args(argv)
    wrong = wrong_entries(HERE)
    if wrong or args.check:
        print("\n".join(wrong) or f"{len(MUTANTS)} mutants, each text found once")
        return 1 if wrong else 0
    chosen = [m for m in MUTANTS if not args.names or any(n in m.name or n == m.file for n in args.names)]
    count = collections.Counter()
    with tempfile.TemporaryDirectory() as tmp, concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        copies = queue.Queue()
        for job in range(args.jobs):
            copies.put(scratch_copy(os.path.join(tmp, str(job))))
        named = sorted({test for m in chosen if not m.equivalent for test in m.tests.split()})
        if named and not args.quick and not run_tests(copies.queue[0], named, 1800):
            print(open(copies.queue[0] + ".txt").read(),
                  "the tests that these mutants name fail without a mutant: mend that first", sep="")
            return 1

        def judge(mutant):
            folder = copies.get()
            try:
                return verdict(mutant, folder, args.quick)
            finally:
                copies.put(folder)
        tasks = {pool.submit(judge, m): m for m in chosen}
        with tqdm(total=len(chosen), unit="mutant") as bar:
            for task in concurrent.futures.as_completed(tasks):
                m = tasks[task]
                result, why = task.result()
                count[result] += 1
                tqdm.write(f"{result:10s} {m.file}: {m.name}" + f" ({why})" * bool(why))
                bar.update()
    judged = count["killed"] + count["SURVIVED"]
    print(f"{len(chosen)} mutants: {count['killed']} killed, {count['SURVIVED']} survived "
          f"({count['SURVIVED'] / max(1, judged):.1%}), {count['equivalent']} equivalent")
    return 1 if count["SURVIVED"] else 0


if __name__ == "__main__":
    sys.exit(main())

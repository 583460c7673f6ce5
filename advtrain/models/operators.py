"""Operators of ATen that an archive may use: those that exported networks have.

Left out is whatever does not check its indices (`..._backward`), reads memory that it has not written (`empty`), makes
views of any size (`as_strided`, `_reshape_alias`), reaches files or the terminal, or writes into an output (`.out`).
"""

from __future__ import annotations

_NAMES = """
__and__ __or__ __xor__ _adaptive_avg_pool2d _assert_async _assert_scalar _assert_tensor_metadata _log_softmax
_native_batch_norm_legit _native_batch_norm_legit_no_training _native_multi_head_attention _safe_softmax
_scaled_dot_product_efficient_attention _scaled_dot_product_flash_attention
_scaled_dot_product_flash_attention_for_cpu _softmax _to_copy _transformer_encoder_layer_fwd _trilinear _unsafe_view
_upsample_bicubic2d_aa _upsample_bilinear2d_aa abs acos acosh adaptive_avg_pool1d adaptive_avg_pool2d
adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d add addbmm addcdiv addcmul addmm addmv adjoint
affine_grid_generator alias all alpha_dropout amax amin aminmax any arange argmax argmin argsort asin asinh atan
atan2 atanh avg_pool1d avg_pool2d avg_pool3d baddbmm batch_norm bernoulli bilinear bitwise_and bitwise_not
bitwise_or bitwise_xor bmm broadcast_tensors broadcast_to bucketize cat cdist ceil celu chain_matmul channel_shuffle
chunk clamp clamp_max clamp_min clip clone col2im column_stack concat concatenate constant_pad_nd contiguous conv1d
conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution cos cosh cosine_similarity
count_nonzero cross cumprod cumsum deg2rad detach diag diag_embed diagonal diff dist div divide dot dropout dstack
einsum elu embedding eq equal erf erfc erfinv exp exp2 expand expand_as expm1 eye feature_dropout fft_fft2 fft_fftn
fft_fftshift fft_ifft2 fft_ifftn fft_ifftshift fft_irfft2 fft_rfft2 fix flatten flip float_power floor floor_divide
fmod frac full full_like gather ge gelu glu greater greater_equal grid_sampler_2d group_norm gru gt hardshrink
hardsigmoid hardswish hardtanh heaviside histc hstack hypot im2col imag index index_add index_fill index_put
index_select inner instance_norm isclose isfinite isin isinf isnan kron layer_norm ldexp le leaky_relu lerp less
less_equal lift_fresh_copy linalg_matrix_norm linalg_multi_dot linalg_norm linalg_vector_norm linear linspace log
log10 log1p log2 log_sigmoid log_softmax logaddexp logcumsumexp logical_and logical_not logical_or logical_xor logit
logsumexp lstm lt mT masked_fill masked_scatter masked_select matmul max max_pool1d max_pool2d
max_pool2d_with_indices max_pool3d maximum mean median meshgrid min minimum mish mm moveaxis movedim msort mul
multiply mv nan_to_num nanmean nansum narrow native_channel_shuffle native_group_norm native_layer_norm ne neg
negative new_full new_ones new_zeros norm not_equal numpy_T one_hot ones ones_like outer pad pairwise_distance
permute pixel_shuffle pixel_unshuffle polar positive pow prelu prod quantile rad2deg rand rand_like randint randn
randn_like randperm ravel real reciprocal relu relu6 remainder repeat repeat_interleave reshape resolve_conj
resolve_neg rms_norm rnn_relu rnn_tanh roll rot90 round rrelu rsqrt rsub scalar_tensor scaled_dot_product_attention
scatter scatter_add scatter_reduce searchsorted select select_scatter selu sgn sigmoid sign silu sin sinc sinh slice
slice_scatter softmax softplus softshrink sort split split_with_sizes sqrt square squeeze stack std std_mean sub
subtract sum sum_to_size swapaxes swapdims sym_constrain_range sym_constrain_range_for_size sym_numel sym_size
sym_storage_offset sym_stride t take take_along_dim tan tanh tanhshrink tensor_split tensordot threshold tile to
topk trace transpose trapezoid tril triu true_divide trunc type_as unbind unflatten unfold unsqueeze
upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_trilinear3d
var var_mean view view_as view_as_complex view_as_real vstack where xlogy zeros zeros_like
"""
OPERATORS = frozenset(_NAMES.split())

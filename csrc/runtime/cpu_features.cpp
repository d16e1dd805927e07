#include "runtime/cpu_features.h"

#ifdef GOSSAMER_X86
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace gossamer {
namespace {

#ifdef GOSSAMER_X86
struct Leaf {
  unsigned a = 0, b = 0, c = 0, d = 0;
};

Leaf cpuid(unsigned leaf, unsigned part) {
  Leaf r;
  if (!__get_cpuid_count(leaf, part, &r.a, &r.b, &r.c, &r.d)) return {};
  return r;
}

// What the operating system saves on a context switch.
uint64_t enabled_state() {
  if (!(cpuid(1, 0).c >> 27 & 1)) return 0;
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t{high} << 32 | low;
}

bool detect_avx2() {
  const unsigned c = cpuid(1, 0).c;
  return (enabled_state() & 6) == 6 && (c >> 12 & 1) && (c >> 29 & 1) && (cpuid(7, 0).b >> 5 & 1);
}

bool detect_avx512() {
  const unsigned b = cpuid(7, 0).b;  // F 16, DQ 17, BW 30, VL 31
  return detect_avx2() && (enabled_state() & 0xe6) == 0xe6 && (b >> 16 & 1) && (b >> 17 & 1) && (b >> 30 & 1) &&
         (b >> 31 & 1);
}

// With VBMI2, which kernels of sparse weights take, and which all but Cooper Lake have.
bool detect_avx512_bf16() { return detect_avx512() && (cpuid(7, 1).a >> 5 & 1) && (cpuid(7, 0).c >> 6 & 1); }

// Tile state must be enabled by the system, and granted to the process on request.
bool detect_amx() {
#ifdef __linux__
  const unsigned d = cpuid(7, 0).d;  // AMX-BF16 22, AMX-TILE 24
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return detect_avx512_bf16() && (enabled_state() >> 17 & 3) == 3 && (d >> 22 & 1) && (d >> 24 & 1) &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// Asked once: in a virtual machine every cpuid is a trap.
[[maybe_unused]] bool has_avx2() {
  static const bool yes = detect_avx2();
  return yes;
}
[[maybe_unused]] bool has_avx512() {
  static const bool yes = detect_avx512();
  return yes;
}
[[maybe_unused]] bool has_avx512_bf16() {
  static const bool yes = detect_avx512_bf16();
  return yes;
}
[[maybe_unused]] bool has_amx() {
  static const bool yes = detect_amx();
  return yes;
}
#endif

}  // namespace

std::vector<std::string> supported_isas() {
  std::vector<std::string> names{"portable"};
#ifdef GOSSAMER_X86
  for (const char* name : {"avx2", "avx512", "avx512_bf16", "amx"})
    if (kernels_of(name) != nullptr) names.push_back(name);
#endif
  names.push_back("amx_emulated");
  return names;
}

const Kernels* kernels_of(const std::string& isa) {
  if (isa == "portable") return portable_kernels();
  if (isa == "amx_emulated") return amx_emulated_kernels();
#ifdef GOSSAMER_HAS_AVX2
  if (isa == "avx2" && has_avx2()) return avx2_kernels();
#endif
#ifdef GOSSAMER_HAS_AVX512
  if (isa == "avx512" && has_avx512()) return avx512_kernels();
#endif
#ifdef GOSSAMER_HAS_AVX512_BF16
  if (isa == "avx512_bf16" && has_avx512_bf16()) return avx512_bf16_kernels();
#endif
#ifdef GOSSAMER_HAS_AMX
  if (isa == "amx" && has_amx()) return amx_kernels();
#endif
  return nullptr;
}

bool prefers_bf16_dot() {
#ifdef GOSSAMER_HAS_AVX512_BF16
  static const Leaf vendor = cpuid(0, 0);  // "AuthenticAMD"
  return has_avx512_bf16() && vendor.b == 0x68747541 && vendor.d == 0x69746e65 && vendor.c == 0x444d4163;
#else
  return false;
#endif
}

}  // namespace gossamer

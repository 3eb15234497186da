# The CUDA kernels without a GPU: compiled by g++ over the fibre emulation and compared with the CPU backend
# (l_*.c); compiled by nvcc for every architecture, spills refused (l_spills_*).
# Every l_*.c is a suite of its own.
file(GLOB kernel_suites CONFIGURE_DEPENDS RELATIVE ${CMAKE_CURRENT_SOURCE_DIR} l_*.c)
list(TRANSFORM kernel_suites REPLACE "\\.c$" "")
include(CheckLanguage)
check_language(CXX)
if(CMAKE_CXX_COMPILER)
  enable_language(CXX)
  file(GLOB kernel_sources CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/kernels/*.cu)
  set_source_files_properties(${kernel_sources} PROPERTIES LANGUAGE CXX)
  add_library(sf_kernels_fibre STATIC ${kernel_sources} fibre/cuda_fibre.cpp)
  set_target_properties(sf_kernels_fibre PROPERTIES CXX_STANDARD 17)
  target_compile_definitions(sf_kernels_fibre PRIVATE KERNELS_FIBRE)
  target_include_directories(sf_kernels_fibre PUBLIC ${CMAKE_SOURCE_DIR} ${CMAKE_CURRENT_SOURCE_DIR}
                             PRIVATE ${CMAKE_SOURCE_DIR}/src)
  target_compile_options(sf_kernels_fibre PRIVATE -ffp-contract=off -fno-strict-aliasing -Wall -Wextra
                         -Wno-unknown-pragmas -Wno-array-bounds) # g++ cannot know that lists have at most 64 entries
  foreach(suite ${kernel_suites})
    add_executable(test_${suite} ${suite}.c)
    target_compile_definitions(test_${suite} PRIVATE _GNU_SOURCE)
    target_link_libraries(test_${suite} PRIVATE test_support sf_kernels_fibre sf_backend sf_think PkgConfig::CUNIT)
    set_target_properties(test_${suite} PROPERTIES LINKER_LANGUAGE CXX)
    add_test(NAME ${suite} COMMAND test_${suite})
    set_tests_properties(${suite} PROPERTIES ENVIRONMENT "${test_env}" TIMEOUT 240)
  endforeach()
endif()

# ThreadSanitizer over ranks as threads: the protocols between devices, without the other kernels.
if(CMAKE_CXX_COMPILER AND NOT SFUMATO_ASAN)
  add_executable(test_l_reduce_tsan l_reduce.c suite.c fibre/cuda_fibre.cpp ${CMAKE_SOURCE_DIR}/kernels/reduce.cu
                 ${CMAKE_SOURCE_DIR}/kernels/rows.cu)
  target_compile_definitions(test_l_reduce_tsan PRIVATE _GNU_SOURCE KERNELS_FIBRE REDUCE_ALONE
                             KERNELS_NORM_THREADS=64)
  target_include_directories(test_l_reduce_tsan PRIVATE ${CMAKE_SOURCE_DIR} ${CMAKE_CURRENT_SOURCE_DIR}
                             ${CMAKE_SOURCE_DIR}/src)
  target_compile_options(test_l_reduce_tsan PRIVATE -fsanitize=thread -ffp-contract=off -fno-strict-aliasing
                         -Wno-unknown-pragmas)
  target_link_options(test_l_reduce_tsan PRIVATE -fsanitize=thread)
  target_link_libraries(test_l_reduce_tsan PRIVATE PkgConfig::CUNIT Threads::Threads m)
  set_target_properties(test_l_reduce_tsan PROPERTIES LINKER_LANGUAGE CXX CXX_STANDARD 17)
  add_test(NAME l_reduce_tsan COMMAND test_l_reduce_tsan)
  set_tests_properties(l_reduce_tsan PROPERTIES ENVIRONMENT "${test_env}" TIMEOUT 240)
endif()

# The same suites on a device, where there is one.
if(SFUMATO_HAVE_CUDA)
  foreach(suite ${kernel_suites})
    add_executable(test_${suite}_gpu ${suite}.c)
    target_compile_definitions(test_${suite}_gpu PRIVATE _GNU_SOURCE)
    target_link_libraries(test_${suite}_gpu PRIVATE test_support sf_kernels sf_backend sf_think PkgConfig::CUNIT)
    add_test(NAME ${suite}_gpu COMMAND test_${suite}_gpu)
    set_tests_properties(${suite}_gpu PROPERTIES ENVIRONMENT "${test_env}" TIMEOUT 240 SKIP_RETURN_CODE 77)
  endforeach()
endif()

find_package(Python3 COMPONENTS Interpreter QUIET)
# nvcc makes the same code whatever sanitizers g++ is given
if(SFUMATO_HAVE_CUDA AND Python3_FOUND AND NOT SFUMATO_ASAN)
  foreach(arch 80 90a 100)
    add_test(NAME l_spills_sm${arch}
             COMMAND Python3::Interpreter ${CMAKE_CURRENT_SOURCE_DIR}/check_spills.py --nvcc
                     ${CUDAToolkit_NVCC_EXECUTABLE} --arch ${arch} --source ${CMAKE_SOURCE_DIR})
    set_tests_properties(l_spills_sm${arch} PROPERTIES TIMEOUT 600)
  endforeach()
endif()
